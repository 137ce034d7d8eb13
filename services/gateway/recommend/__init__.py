"""The Recommend call: parse, retrieve, filter, rank, build the page, respond, log."""
