"""The state of users and items in memory, as of a point in time."""
