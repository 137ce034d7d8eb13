"""Numbers to a device of torch's and back, without either side waiting for the other; who computes on it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
V = TypeVar("V")
Running = Callable[[], np.ndarray]
"""Waits for numbers that are being computed: on a GPU the next batch may begin meanwhile."""

_CORES = torch.get_num_threads()
"""As many as torch found: OMP_NUM_THREADS, or the cores that this process may use."""
_MOST_THREADS = 16  # which share Python's lock: 5 of the 90 ms that 250 tokens take MiniLM on a core


def model_threads(device: torch.device | str) -> int:
    """How many threads run a device's models best, each a batch of its own (decision 0035).

    A GPU has one. Of a processor each has a core, and waits for no other at every product of matrices.
    """
    return 1 if is_gpu(device) else _CORES // -(-_CORES // _MOST_THREADS)


def share_cores(threads: int) -> None:
    """Called by each of so many threads: it computes on its share of the cores.

    So do threads that torch first sees later, until one calls `torch.set_num_threads`; others keep theirs.
    """
    torch.get_num_threads()  # else torch sees the thread later, and gives it what was last set by any
    torch.set_num_threads(max(_CORES // threads, 1))


def side_by_side(run: Callable[[T], V], batches: Iterable[T], device: torch.device | str) -> Iterator[V]:
    """What `run` gives of each batch, in their order, by as many threads as the device's models have.

    One caller at a time: else one may take the other's share for its own.
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
        torch.set_num_threads(before)  # for threads to come


def is_gpu(device: torch.device | str) -> bool:
    """Whether what is begun there goes on by itself."""
    return torch.device(device).type == "cuda"


def room(shape: Sequence[int], kind: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Memory of this machine, from and to which `device` copies by itself."""
    return torch.empty(*shape, dtype=kind, pin_memory=is_gpu(device))


def sent(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A copy on its way to `device`."""
    given = torch.from_numpy(values)
    return room(given.shape, given.dtype, device).copy_(given).to(device, non_blocking=True)


def brought(values: torch.Tensor) -> Running:
    """The way back from a device."""
    here = room(values.shape, values.dtype, values.device).copy_(values, non_blocking=True)
    done = None
    if values.is_cuda:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits for it sleeps
        done.record(torch.cuda.current_stream(values.device))

    def wait() -> np.ndarray:
        if done is not None:
            done.synchronize()
        return here.numpy()

    return wait
