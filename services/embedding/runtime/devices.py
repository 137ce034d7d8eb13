"""Asynchronous copies to and from a torch device, and the threads that compute on it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from services.core.errors import FailedPrecondition

T = TypeVar("T")
V = TypeVar("V")
PendingArray = Callable[[], np.ndarray]
"""Waits for an array that is being computed; on a GPU the next batch may start meanwhile."""

AUTO = "auto"
_CORES = torch.get_num_threads()
"""Torch's default: OMP_NUM_THREADS, or the number of cores that this process may use."""
_MAX_THREADS = 16  # they share the GIL: 5 of the 90 ms that MiniLM takes for 250 tokens on a core


def model_threads(device: torch.device | str) -> int:
    """The best number of threads for a device's models, each with its own batch (decision 0035).

    A GPU has one thread. On a CPU each thread has its own cores, so that matrix products do not synchronize.
    """
    return 1 if is_gpu(device) else _CORES // -(-_CORES // _MAX_THREADS)


def share_cores(threads: int) -> None:
    """Limit torch in the calling thread, one of `threads`, to its share of the cores.

    Threads that use torch for the first time later inherit the limit until `torch.set_num_threads` is called.
    """
    # Registers the thread, so that torch does not later give it a limit that another thread set.
    torch.get_num_threads()
    torch.set_num_threads(max(_CORES // threads, 1))


def map_batches(run: Callable[[T], V], batches: Iterable[T], device: torch.device | str) -> Iterator[V]:
    """Map `run` over batches in order, by as many threads as the device's models have.

    Only one caller at a time: it saves and restores torch's thread count.
    """
    threads = model_threads(device)
    if threads == 1:
        yield from map(run, batches)
        return
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "encode", partial(share_cores, threads)) as pool:
            yield from pool.map(run, batches)
    finally:
        torch.set_num_threads(before)  # for later threads


def resolve(device: str) -> str:
    """The device that a setting names: `auto` is cuda if torch sees a GPU that it can use, else cpu.

    Raises:
        FailedPrecondition: the setting names a GPU that torch cannot use.
    """
    if device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if is_gpu(device) and not torch.cuda.is_available():
        raise FailedPrecondition(
            f"--device {device}: torch finds no GPU that it can use; install the driver and a torch built "
            "for it, or serve with --device cpu"
        )
    return device


def is_gpu(device: torch.device | str) -> bool:
    """Whether the device computes asynchronously."""
    return torch.device(device).type == "cuda"


def host_buffer(shape: Sequence[int], kind: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A host tensor; for a GPU it is pinned, so that copies are asynchronous."""
    return torch.empty(*shape, dtype=kind, pin_memory=is_gpu(device))


def to_device(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Start a copy to `device`."""
    source = torch.from_numpy(values)
    return host_buffer(source.shape, source.dtype, device).copy_(source).to(device, non_blocking=True)


def to_host(values: torch.Tensor) -> PendingArray:
    """Start a copy to the host; the result waits for it."""
    copy = host_buffer(values.shape, values.dtype, values.device).copy_(values, non_blocking=True)
    event = None
    if values.is_cuda:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a waiting thread sleeps
        event.record(torch.cuda.current_stream(values.device))

    def wait() -> np.ndarray:
        if event is not None:
            event.synchronize()
        return copy.numpy()

    return wait
