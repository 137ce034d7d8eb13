"""Writes of items, the view that is searched, and backfill for another bundle."""
