"""The published Amazon splits: behaviour with short texts or none, which stay outside the repository."""
