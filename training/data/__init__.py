"""A shop directory: its settings, items, events and images."""
