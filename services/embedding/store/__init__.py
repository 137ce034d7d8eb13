"""Items and their vectors in SQL."""
