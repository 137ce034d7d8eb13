"""Measurements: what Vitrine is compared with, and how fast it is."""
