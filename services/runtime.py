"""How the libraries of this process use cores and memory. Import it before any of them; it imports none."""

import os


def prepare() -> None:
    """Set what libraries read from the environment as they load, where it does not say otherwise.

    GNU's OpenMP, which torch, FAISS and LightGBM each bring, lets threads that wait for each other spin. On
    cores that another process wants as well, a spinning thread keeps the one it waits for from running.

    Pillow's blocks of 16 MB come from the heaps of the C library, one for each thread, and never go back to
    the system; larger ones do, whatever the C library has learned (its limit is 32 MB).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")
