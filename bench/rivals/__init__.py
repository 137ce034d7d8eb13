"""Other libraries, asked what Vitrine is asked."""
