"""The runs that an engine still has to carry out: which is next, and what to do with one that did not end well."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from residuum.engines.workers import BUSY, Doing, Ended, Tell
from residuum.runfolders import fail


class Orders:
    """Runs in the order in which they are carried out.

    A run that another sweep is carrying out is looked at again later. One whose worker was killed is tried a second
    time, after all others: most often the memory was full, and it goes on from its checkpoint.

    Args:
        folders: The runs' folders.
        tell: Is told how each of them goes, and once how it ended.
    """

    def __init__(self, folders: Sequence[Path], tell: Tell) -> None:
        self.left = len(folders)  # runs that have not ended
        self._waiting = deque((0.0, folder) for folder in folders)
        self._tell, self._again = tell, set[Path]()

    def some(self, most: int) -> list[Path]:
        """The runs to carry out next, at most so many; none if those that are left are being carried out."""
        due = [entry for entry in self._waiting if entry[0] <= monotonic()][: max(0, most)]
        for entry in due:
            self._waiting.remove(entry)
        return [folder for _, folder in due]

    def heard(self, folder: Path, news: Doing | Ended) -> None:
        """Take note of what a worker said about a run."""
        if isinstance(news, Ended):
            if news.state == "busy" or (news.kind == "killed" and folder not in self._again):
                if news.kind == "killed":
                    self._again.add(folder)
                self._waiting.append((monotonic() + BUSY, folder))
                return
            if news.kind in ("killed", "time limit"):  # the worker could not say so itself
                fail(folder, news.kind, news.message)
            self.left -= 1
        self._tell(folder, news)
