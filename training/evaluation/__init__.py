"""Evaluation of fitted models, and the report."""
