"""Sets how native libraries use cores and memory. Import it before them; it imports none of them."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def prepare() -> None:
    """Set environment variables that libraries read when they load, unless they are set already.

    In GNU OpenMP, which torch, FAISS and LightGBM each include, threads that wait for each other spin. On
    cores that other processes use too, a spinning thread keeps the thread it waits for from running.

    NumPy's OpenBLAS spins as well, and no setting stops that. With its second thread a page costs about twice
    the CPU time and comes no sooner: the matrices of a request are small (docs/performance.md).

    Pillow allocates blocks of 16 MB in the C library's heaps, one heap per thread, and such blocks never
    return to the system. Blocks above 32 MB, the C library's largest threshold, do.

    torchvision, transformers and torch's optimizers load torch._dynamo, which loads the compiler triton if it
    is installed. Vitrine does not compile, and triton logs its own leaks at each exit.

    FAISS logs which of its builds are missing, which does not matter.
    """
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type] # None means not installed
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # on a read-only system; torch wants a directory, but only for compiled code
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", sys.prefix)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")


@contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """Let optional dependencies look as if they were not installed while a library is imported.

    Modules that are loaded already stay visible.
    """
    absent = [name for name in modules if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment] # an import of it raises ModuleNotFoundError
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
