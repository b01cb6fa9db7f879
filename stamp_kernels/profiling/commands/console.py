"""Progress, tables and error messages of the command."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table


@contextmanager
def user_errors() -> Iterator[None]:
    """Report an error in the input as one line, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"stamp-profile: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def loading(output: Path | None, threads: int | None) -> Iterator[None]:
    """Show that a run is being prepared; check its output directory first, and set torch's threads.

    Raises:
        ValueError: the directory cannot be written, or `threads` is below 1.
    """
    if output is not None:
        _check_writable(output)
    with _stderr().status("loading"):
        import torch

        from stamp_kernels.ops._checks import check_count

        if threads is not None:
            check_count("threads", threads, 1)
            torch.set_num_threads(threads)
        yield


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that shows the progress of a stage: its name, how much is done, and how much there is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_stderr()) as progress:
        tasks: dict[str, TaskID] = {}

        def show_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield show_progress


def print_table(table: "Table") -> None:
    """Print a table with whole rows, also to a file or a narrow terminal: truncated numbers are worse than wrapping."""
    from rich.console import Console

    console = Console()
    unbounded = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table)


def print_written(*paths: Path) -> None:
    """Say on stderr which files were written."""
    _stderr().print(f"written: {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def _stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _check_writable(directory: Path) -> None:
    """Make the directory and try a file in it, so that a run does not fail when it writes its results."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error.strerror})") from error
