"""The ranking service: events, candidates and their scores."""
