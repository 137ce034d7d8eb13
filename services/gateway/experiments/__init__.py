"""Scenarios, and which arm of an experiment a request belongs to."""
