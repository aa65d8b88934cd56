"""What is seen of long work: lines, and on the error stream bars with examples per second and time left."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.console

Show = Callable[[int, str], None]  # examples done so far; what is going on
Bar = Callable[[str, int], AbstractContextManager[Show]]  # title; examples in all


def console(*, stderr: bool = False) -> "rich.console.Console":
    """Where lines are printed: names of networks and folders are text, not markup, and no line is broken."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def bar(title: str, total: int) -> Iterator[Show]:
    """A bar on the screen for as long as the `with` block runs.

    Args:
        title: What is being done.
        total: Number of examples in all.

    Yields:
        A function of the number of examples done so far and a line that may replace the title; "" keeps it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, rate="")
        start = perf_counter()

        def show(done: int, text: str = "") -> None:
            rate = f"{done / (perf_counter() - start):,.0f} examples/s"
            progress.update(task, completed=done, description=text or title, rate=rate)

        yield show


@contextmanager
def quiet(title: str, total: int) -> Iterator[Show]:
    """No bar."""
    yield lambda done, text="": None
