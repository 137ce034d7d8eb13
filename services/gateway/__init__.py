"""The gateway: what a shop's backend calls."""
