"""The embedding service: items, their vectors, and the search over them."""
