"""Jobs: what a sweep can carry out, described in JSON, in a folder of its own, going on where it was stopped."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch

from residuum.checkpoints import CheckpointError
from residuum.descriptions import rebuilt
from residuum.progress import Bar
from residuum.runfolders import CHECKPOINT, FORMAT, log

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Where and how a run is carried out; never part of its key.

    Attributes:
        data_root: Folder with the official files of the data sets that have a name; None: the cache.
        device: Where the work is done.
        threads: Of torch. Another number gives other roundings.
        batch: Images measured at a time.
    """

    data_root: Path | None = None
    device: str = "cpu"
    threads: int = 1
    batch: int = 64

    def __post_init__(self) -> None:
        if self.threads < 1 or self.batch < 1:
            raise ValueError(f"threads ({self.threads}) and batch ({self.batch}) must be at least 1")


@runtime_checkable
class Job(Protocol):
    """What a sweep can carry out: a frozen dataclass, as `Run`.

    Attributes:
        kind: Its name in descriptions.
    """

    kind: ClassVar[str]

    @property
    def key(self) -> str:
        """16 hexadecimal digits, of all settings that determine the result; of the code only `FORMAT`."""

    def describe(self) -> dict[str, Any]:
        """What determines the result, as JSON values, among them "kind" and "format"."""

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Job":
        """The inverse of `describe`."""

    def execute(self, folder: Path, settings: Settings, progress: Bar) -> None:
        """Write the results into a folder, going on from what is there."""


def job_from(description: dict[str, Any], cls: type, kinds: Iterable[type]) -> Any:
    """The job that its `describe` described.

    Args:
        description: JSON values.
        cls: The kind of job.
        kinds: It and the dataclasses that may be in it.

    Raises:
        ValueError: If it is not one, or of another format, or does not fit this version of the code.
    """
    given = dict(description)
    kind, form = given.pop("kind", None), given.pop("format", None)
    if (kind, form) != (cls.kind, FORMAT):
        raise ValueError(f"a {kind!r} of format {form}; this code reads {cls.kind!r} of format {FORMAT}")
    return rebuilt(given | {"kind": cls.__name__}, kinds)


def from_checkpoint(folder: Path, attempt: Callable[[], T]) -> T:
    """A training from its checkpoint if that ends with the same bits, else from the beginning.

    Args:
        folder: Of the run.
        attempt: Trains; raises `CheckpointError` if it cannot go on from the checkpoint.
    """
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        log(folder, "goes on from its checkpoint")
    while True:
        try:
            return attempt()
        except CheckpointError as error:
            log(folder, f"begins anew: {error}")
            checkpoint.unlink()


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """So many threads while it is open, then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
