"""Encoding through the service against the bare model, and against other servers."""
