"""Training examples: queries, point-in-time feature rows, ranking groups, positive pairs."""
