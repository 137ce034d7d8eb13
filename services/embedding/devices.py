"""Numbers to a device of torch's and back, without either side waiting for the other."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

Running = Callable[[], np.ndarray]
"""Waits for numbers that are being computed: on a GPU the next batch may begin meanwhile."""


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
