"""Items, filters and the item table that all services share."""
