"""Cells of tables: numbers, times, item ids."""
