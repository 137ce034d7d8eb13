"""A made-up shop with a known truth, and a tour of Vitrine through it."""
