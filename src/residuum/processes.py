"""Several processes that train one network under torchrun, and signals that ask a process to stop."""

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized


@dataclass(frozen=True)
class Group:
    """The processes that train together; one alone needs nothing of torch.distributed.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients over the processes; with SyncBatchNorm on CUDA, made in place."""
        if self.size == 1:
            return model
        if next(model.parameters()).device.type == "cuda":
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and is_parametrized(m) for m in model.modules()):
                raise ValueError("clipped batch norms cannot be synchronised across processes; train in one process")
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model)

    def gradients_wait(self, wrapped: nn.Module, wait: bool) -> AbstractContextManager[None]:
        """Within it, gradients are not yet averaged if `wait` (more parts of the step follow)."""
        return wrapped.no_sync() if wait and self.size > 1 else nullcontext()

    def sum(self, value: float) -> float:
        """The sum over the processes, the same in each."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(shared)
        return shared.item()

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return self.sum(float(flag)) > 0

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers (batch-norm statistics) of process 0."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def processes() -> Iterator[Group]:
    """The processes that torchrun started, or this one alone; gloo on processors, NCCL where there is CUDA."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Group(dist.get_rank(), size)
        gc.collect()  # a wrapper that outlives the group can abort the process when it ends
        dist.barrier()
    finally:
        if started:
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process among those that torchrun started; 0 alone."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never left half done; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals go to the main thread, and only that may take them
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
