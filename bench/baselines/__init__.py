"""Other libraries on the same queries as Vitrine."""
