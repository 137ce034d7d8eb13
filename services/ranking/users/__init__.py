"""User profiles and data retention."""
