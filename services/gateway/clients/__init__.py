"""The backends of the gateway, in process or over gRPC, and their circuit breakers."""
