"""The published Amazon splits: behavior with short texts or none, which stay outside the repository."""
