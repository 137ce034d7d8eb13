"""Text and image encoders, and the pool that runs them."""
