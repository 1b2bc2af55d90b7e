"""A progress bar on stderr for long work: silent where stderr is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Advance]:
    """Yield ``advance(note, count=1)``, which moves the bar by ``count`` and shows ``note``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(note: str = "", count: int = 1) -> None:
            progress.update(task, advance=count, note=note)

        yield advance
