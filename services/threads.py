"""How this process's libraries share the cores. Import it before any of them; it imports none."""

import os


def share_cores() -> None:
    """Let OpenMP's threads sleep while they wait for each other; the environment's own word goes first.

    GNU's OpenMP, which torch, FAISS and LightGBM each bring, has them spin. On cores that another
    process wants as well, a spinning thread keeps the one it waits for from running.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
