"""Benchmarks: the quality of Vitrine compared with other methods, and its speed."""
