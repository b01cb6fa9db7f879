"""The `stamp-profile` command."""

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

__all__ = ["app"]

# Errors of the user are one line each, see `train`; what else goes wrong shows a plain traceback.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """What stamp_kernels saves on real recommenders and real sequences."""


@app.command()
def train(
    data: Annotated[
        Path | None,
        typer.Option(
            help="An .npz (seq_items, seq_offsets, sids), a 'user item item ...' text file, or RecBole's .inter.",
            show_default="MovieLens-100K of the installed recbole distribution",
        ),
    ] = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option(help="Names, comma-separated or repeated; an unknown one lists them.", show_default="all"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed training steps of each configuration.")] = 8,
    warmup: Annotated[int, typer.Option(help="Steps before them that are not timed.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast over float32 weights.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:<index>.", show_default="cuda if there is one")
    ] = None,
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
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch.", show_default="torch's choice")] = None,
    max_items: Annotated[int, typer.Option(help="Histories are cut to so many items.")] = 30,
) -> None:
    """Train a TIGER-style T5 recommender, padded, packed and pruned, and report what a step of each costs."""
    # The profiler that measures CPU memory is chatty on stderr; its library reads this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        if output is not None:
            _check_writable(output)
        with errors.status("loading"):
            import torch

            from stamp_kernels.profiling.interactions import load_interactions
            from stamp_kernels.profiling.recommender import CONFIGURATIONS
            from stamp_kernels.profiling.report import draw_picture, render_table, write_json
            from stamp_kernels.profiling.train import TrainSettings, prepare_data, profile_training

            if threads is not None:
                if threads < 1:
                    raise ValueError(f"threads is {threads}, expected at least 1")
                torch.set_num_threads(threads)
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
            )
            training_data = prepare_data(load_interactions(data), settings)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"stamp-profile: {error}", err=True)
        raise typer.Exit(2) from None

    with Progress(*columns, console=errors) as progress:
        tasks = {}

        def show_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        # Files by their names: where they lie is this machine's affair, and reports are published.
        command = shlex.join(Path(word).name if "/" in word else word for word in sys.argv)
        report = profile_training(training_data, settings, command=command, on_progress=show_progress)

    console = Console()
    table = render_table(report)
    # A file or a narrow terminal gets whole rows: numbers cut short are worse than lines that wrap.
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)
    if output is not None:
        write_json(report, output / "train.json")
        draw_picture(report, output / "train.png")
        errors.print(f"written: {output / 'train.json'}, {output / 'train.png'}", soft_wrap=True, highlight=False)


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
