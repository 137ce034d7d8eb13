"""gRPC on the server side, and connections between the services."""
