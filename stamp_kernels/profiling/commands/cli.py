"""The `stamp-profile` command. What takes long to import is imported when a subcommand runs."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stamp_kernels.profiling.commands.console import loading, print_table, print_written, progress_bars, user_errors

if TYPE_CHECKING:
    import torch

# An error in the input is one line, see `user_errors`; any other error shows a plain traceback.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="An .npz file (seq_items, seq_offsets, sids), a text file of lines 'user item item ...', or RecBole's "
        ".inter file.",
        show_default="MovieLens-100K of the installed recbole distribution",
    ),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", help="Sequences per step.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float32, or bfloat16 for bfloat16 autocast over float32 weights.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:<index>.", show_default="cuda if there is one")
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of torch.", show_default="torch's default")
]
MaxItemsOption = Annotated[
    int, typer.Option("--max-items", help="The most items of a history; earlier items are cut off.")
]
MinItemsOption = Annotated[
    int,
    typer.Option(
        "--min-items",
        help="The fewest items of a training row's history; shorter rows are left out. Metrics still cover all users.",
    ),
]


@app.callback()
def main() -> None:
    """Measure what stamp_kernels saves on real recommenders and real sequences."""
    # The profiler that measures CPU memory logs to stderr; its library reads this variable when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@app.command()
def train(
    data: DataOption = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option(help="Names, separated by commas or repeated; an unknown name lists all.", show_default="all"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed training steps of each configuration.")] = 8,
    warmup: Annotated[int, typer.Option(help="Steps before them that are not timed.")] = 1,
    batch_size: BatchSizeOption = 128,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order of the rows and dropout.")] = 0,
    epochs: Annotated[
        int, typer.Option(help="Epochs to train after the timed steps, from fresh weights (0: none).")
    ] = 0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Compute Recall and NDCG at 5 and 10 on every user's last item.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Directory for train.json and train.png.", show_default="print only the table")
    ] = None,
    threads: ThreadsOption = None,
    max_items: MaxItemsOption = 30,
    min_items: MinItemsOption = 1,
) -> None:
    """Train a TIGER-style T5 recommender, padded, packed and pruned, and report what a step of each costs."""
    with user_errors(), loading(output, threads):
        from stamp_kernels.profiling.commands.picture import draw_picture
        from stamp_kernels.profiling.commands.report import write_json
        from stamp_kernels.profiling.commands.settings import TrainSettings
        from stamp_kernels.profiling.commands.tables import render_table
        from stamp_kernels.profiling.commands.train import profile_training
        from stamp_kernels.profiling.commands.training_data import prepare_data
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

    with progress_bars() as show_progress:
        report = profile_training(training_data, settings, command=_command(), on_progress=show_progress)

    print_table(render_table(report))
    if output is not None:
        write_json(report, output / "train.json")
        draw_picture(report, output / "train.png")
        print_written(output / "train.json", output / "train.png")


@app.command()
def quality(
    data: DataOption = None,
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, separated by commas or repeated; an unknown name lists all.",
            show_default="padded-eager,packed,packed+sap,packed+sap+map",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(help="The number of seeds, from 0 on, of the weights, the order of the rows and dropout.")
    ] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 10,
    batch_size: BatchSizeOption = 128,
    rows: Annotated[
        int | None,
        typer.Option(help="Training rows in a random sample, the same for every seed.", show_default="all"),
    ] = None,
    max_items: MaxItemsOption = 30,
    min_items: MinItemsOption = 1,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW, constant.")] = 1e-3,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    layers: Annotated[int, typer.Option(help="Blocks of the encoder, and of the decoder.")] = 4,
    d_model: Annotated[int, typer.Option(help="Width of the states.")] = 128,
    num_heads: Annotated[int, typer.Option(help="Attention heads.")] = 6,
    d_kv: Annotated[int, typer.Option(help="Width of a head, a multiple of 8 up to 256.")] = 64,
    d_ff: Annotated[int, typer.Option(help="Width of the feed-forward layers.")] = 1024,
    prune_after_block: Annotated[
        int, typer.Option(help="The encoder block after which SAP prunes; blocks count from 1.")
    ] = 2,
    keep_ratio: Annotated[
        float, typer.Option(help="Share of a history's tokens that SAP keeps.", show_default="1/3")
    ] = 1 / 3,
    dropout: Annotated[float, typer.Option(help="Dropout of the model.")] = 0.1,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory for quality.json, which is written after each configuration and seed; another run with the "
            "same settings continues from it.",
            show_default="print only the table",
        ),
    ] = None,
) -> None:
    """Train each configuration from several seeds, and report Recall and NDCG at 5 and 10 on every user's last item."""
    with user_errors(), loading(output, threads):
        from stamp_kernels.profiling.commands.quality import DEFAULT_CONFIGURATIONS, finished_results, measure_quality
        from stamp_kernels.profiling.commands.report import write_json
        from stamp_kernels.profiling.commands.settings import QualitySettings
        from stamp_kernels.profiling.commands.tables import render_quality_table
        from stamp_kernels.profiling.commands.training_data import prepare_data
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

    with progress_bars() as show_progress:
        report = measure_quality(
            training_data,
            settings,
            finished=finished,
            command=_command(),
            on_report=None if path is None else lambda report: write_json(report, path),
            on_progress=show_progress,
        )

    print_table(render_quality_table(report))
    if path is not None:
        print_written(path)


def _command() -> str:
    """The command as it was typed, but with the names of files instead of their paths: reports are published."""
    return shlex.join(Path(word).name if "/" in word else word for word in sys.argv)


def _split_names(values: list[str]) -> tuple[str, ...]:
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def _find_device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:<index>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of the {torch.cuda.device_count()} GPUs that torch finds, got {name!r}")
    return device


if __name__ == "__main__":
    app()
