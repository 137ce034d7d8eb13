"""Events, impressions and identities in SQL."""
