"""Page rules over arrays: caps, quotas, boosts, exploration, rank fusion."""
