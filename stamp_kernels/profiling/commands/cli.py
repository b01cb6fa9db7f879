"""The `stamp-profile` command."""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

__all__ = ["app"]

# Errors of the user are one line each, see `_user_errors`; what else goes wrong shows a plain traceback.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="An .npz (seq_items, seq_offsets, sids), a 'user item item ...' text file, or RecBole's .inter.",
        show_default="MovieLens-100K of the installed recbole distribution",
    ),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", help="Sequences per step.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, or bfloat16 for autocast over float32 weights.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:<index>.", show_default="cuda if there is one")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of torch.", show_default="torch's choice")
]
MaxItemsOption = Annotated[int, typer.Option("--max-items", help="Histories are cut to so many items.")]
MinItemsOption = Annotated[
    int,
    typer.Option(
        "--min-items",
        help="Training rows with a shorter history are left out; metrics are of every user all the same.",
    ),
]


@app.callback()
def main() -> None:
    """What stamp_kernels saves on real recommenders and real sequences."""
    # The profiler that measures CPU memory is chatty on stderr; its library reads this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@app.command()
def train(
    data: DataOption = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option(help="Names, comma-separated or repeated; an unknown one lists them.", show_default="all"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed training steps of each configuration.")] = 8,
    warmup: Annotated[int, typer.Option(help="Steps before them that are not timed.")] = 1,
    batch_size: BatchSizeOption = 128,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the order of the rows and dropout.")] = 0,
    epochs: Annotated[
        int, typer.Option(help="Then train each configuration so long, from fresh weights; 0: timed steps alone.")
    ] = 0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Recall@5/10 and NDCG@5/10 on every user's last item.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Directory for train.json and train.png.", show_default="table alone")
    ] = None,
    threads: ThreadsOption = None,
    max_items: MaxItemsOption = 30,
    min_items: MinItemsOption = 1,
) -> None:
    """Train a TIGER-style T5 recommender, padded, packed and pruned, and report what a step of each costs."""
    with _user_errors(), _loading(output, threads):
        from stamp_kernels.profiling.commands.report import draw_picture, render_table, write_json
        from stamp_kernels.profiling.commands.train import TrainSettings, prepare_data, profile_training
        from stamp_kernels.profiling.data.interactions import load_interactions
        from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS

        settings = TrainSettings(
            configurations=CONFIGURATIONS if configurations is None else _split_names(configurations),
            steps=steps,
            warmup=warmup,
            batch_size=batch_size,
            dtype=dtype,
            device=_find_device(device),
            seed=seed,
            epochs=epochs,
            evaluate=evaluate,
            max_items=max_items,
            min_items=min_items,
        )
        training_data = prepare_data(load_interactions(data), settings)

    with _progress_bars() as show_progress:
        report = profile_training(training_data, settings, command=_command(), on_progress=show_progress)

    _print_table(render_table(report))
    if output is not None:
        write_json(report, output / "train.json")
        draw_picture(report, output / "train.png")
        _say_written(output / "train.json", output / "train.png")


@app.command()
def quality(
    data: DataOption = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, comma-separated or repeated; an unknown one lists them.",
            show_default="padded-eager,packed,packed+sap,packed+sap+map",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="Seeds of the weights, the order of the rows and dropout: 0 to one less than so many.")
    ] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 10,
    batch_size: BatchSizeOption = 128,
    rows: Annotated[
        int | None,
        typer.Option(help="Train on a random sample of so many rows, the same for every seed.", show_default="all"),
    ] = None,
    max_items: MaxItemsOption = 30,
    min_items: MinItemsOption = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, constant.")] = 1e-3,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    layers: Annotated[int, typer.Option(help="Blocks of the encoder, and as many of the decoder.")] = 4,
    d_model: Annotated[int, typer.Option(help="Width of the states.")] = 128,
    num_heads: Annotated[int, typer.Option(help="Attention heads.")] = 6,
    d_kv: Annotated[int, typer.Option(help="Width of a head, a multiple of 8 up to 256.")] = 64,
    d_ff: Annotated[int, typer.Option(help="Width of the feed-forward layers.")] = 1024,
    prune_after_block: Annotated[int, typer.Option(help="SAP prunes after this block, counted from 1.")] = 2,
    keep_ratio: Annotated[
        float, typer.Option(help="Share of a history's tokens that SAP keeps.", show_default="1/3")
    ] = 1 / 3,
    dropout: Annotated[float, typer.Option(help="Of the model.")] = 0.1,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for quality.json, written after each configuration and seed; a run with the same settings "
            "goes on from what is there.",
            show_default="table alone",
        ),
    ] = None,
) -> None:
    """Train each configuration from several seeds, and report Recall and NDCG at 5 and 10 on every user's last item."""
    with _user_errors(), _loading(output, threads):
        from stamp_kernels.profiling.commands.quality import (
            DEFAULT_CONFIGURATIONS,
            QualitySettings,
            finished_results,
            measure_quality,
        )
        from stamp_kernels.profiling.commands.report import render_quality_table, write_json
        from stamp_kernels.profiling.commands.train import prepare_data
        from stamp_kernels.profiling.data.interactions import load_interactions
        from stamp_kernels.profiling.recommender.recommender import RecommenderSettings

        settings = QualitySettings(
            configurations=DEFAULT_CONFIGURATIONS if configurations is None else _split_names(configurations),
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            rows=rows,
            max_items=max_items,
            min_items=min_items,
            learning_rate=learning_rate,
            dtype=dtype,
            device=_find_device(device),
            model=replace(
                RecommenderSettings(),
                num_layers=layers,
                d_model=d_model,
                num_heads=num_heads,
                d_kv=d_kv,
                d_ff=d_ff,
                prune_after_block=prune_after_block,
                keep_ratio=keep_ratio,
                dropout=dropout,
            ),
        )
        training_data = prepare_data(load_interactions(data), settings)
        path = None if output is None else output / "quality.json"
        finished = None if path is None else finished_results(path, training_data, settings)

    with _progress_bars() as show_progress:
        report = measure_quality(
            training_data,
            settings,
            finished=finished,
            command=_command(),
            on_report=None if path is None else lambda report: write_json(report, path),
            on_progress=show_progress,
        )

    _print_table(render_quality_table(report))
    if path is not None:
        _say_written(path)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Say what is wrong with the input in one line, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"stamp-profile: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _loading(output: Path | None, threads: int | None) -> Iterator[None]:
    """Show that a run is being prepared; first try its output folder, and set torch's threads.

    Raises:
        ValueError: the folder cannot be written, or `threads` is below 1.
    """
    if output is not None:
        _check_writable(output)
    with _errors().status("loading"):
        import torch

        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads is {threads}, expected at least 1")
            torch.set_num_threads(threads)
        yield


@contextmanager
def _progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Gives what shows the progress of a stage: its name, how much is done, and how much there is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_errors()) as progress:
        tasks = {}

        def show_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield show_progress


def _errors() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _print_table(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    # A file or a narrow terminal gets whole rows: numbers cut short are worse than lines that wrap.
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


def _say_written(*paths: Path) -> None:
    _errors().print(f"written: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def _command() -> str:
    """The command as it was typed, but files by their names: reports are published, and where files lie is private."""
    return shlex.join(Path(word).name if "/" in word else word for word in sys.argv)


def _split_names(values: list[str]) -> tuple[str, ...]:
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def _find_device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "expected cpu, cuda or cuda:<index>"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, {expected}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, {expected}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, and torch finds {torch.cuda.device_count()} GPUs")
    return device


def _check_writable(directory: Path) -> None:
    """Make the directory and try a file in it, so that a run does not end without a place for its results."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error.strerror})") from error
