"""Candidate sources, and candidates for exploration."""
