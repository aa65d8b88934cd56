"""How many bytes of tensors live: a counter for processors, which have no `max_memory_allocated`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_ROWS, _COLUMNS = ("values", "crow_indices", "col_indices"), ("values", "ccol_indices", "row_indices")
_PARTS = {torch.sparse_coo: ("_values", "_indices"), torch.sparse_csr: _ROWS, torch.sparse_bsr: _ROWS}
_PARTS |= {torch.sparse_csc: _COLUMNS, torch.sparse_bsc: _COLUMNS}


class Bytes(AbstractContextManager["Bytes"]):
    """Counts the bytes of storages that come into being within it, as long as they live, whoever keeps them.

    It sees each operation's results, those in the backward included, so also tensors that autograd saves and those that
    a library keeps on objects of its own or resizes; views count once. Not seen is what an operation allocates for
    itself and frees before it ends. What was there before does not count.

    Attributes:
        peak: The most bytes that lived at once, looked at after every operation.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._storages: dict[int, ref[torch.UntypedStorage]] = {}
        self._older: dict[int, ref[torch.UntypedStorage]] = {}
        self._mode = _Mode(self)

    @property
    def live(self) -> int:
        """The bytes that live now."""
        alive = [storage for kept in self._storages.values() if (storage := kept()) is not None]
        self._storages = {id(storage): self._storages[id(storage)] for storage in alive}
        return sum(storage.nbytes() for storage in alive)

    def see(self, before: Any, after: Any) -> None:
        """What an operation got and gave."""
        for storage in _storages(before):
            if not _holds(self._storages, storage):
                self._older[id(storage)] = ref(storage)
        for storage in _storages(after):
            if not _holds(self._older, storage):
                self._storages[id(storage)] = ref(storage)
        self.peak = max(self.peak, self.live)

    def __enter__(self) -> "Bytes":
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors; a sparse one has one for its values and one for each kind of its indices."""
    for tensor in tree_iter(tree):
        if isinstance(tensor, Tensor):
            parts = [getattr(tensor, name)() for name in _PARTS.get(tensor.layout, ())] or [tensor]
            yield from (part.untyped_storage() for part in parts)


def _holds(kept: dict[int, "ref[torch.UntypedStorage]"], storage: torch.UntypedStorage) -> bool:
    """Whether it is there; its number alone may be that of one that is gone."""
    return id(storage) in kept and kept[id(storage)]() is storage


class _Mode(TorchDispatchMode):
    def __init__(self, counter: Bytes) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        after = func(*args, **(kwargs or {}))
        self.counter.see((args, kwargs), after)
        return after
