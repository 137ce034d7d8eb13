"""Fits the item graph and the sequence model."""
