"""Fits the CTR head, the reranker and the propensity model."""
