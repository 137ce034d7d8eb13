"""Scores of candidates, and their explanations."""
