"""Fetching and decoding image files, which may be malicious."""
