"""A fuzzer that sends malformed requests to a real server: see `__main__.py`."""
