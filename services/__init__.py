"""The gateway, ranking and embedding services, what they share, and `serving`, which runs them."""
