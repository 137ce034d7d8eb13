"""The composition root: a process, its loaded bundles, and how they are swapped."""
