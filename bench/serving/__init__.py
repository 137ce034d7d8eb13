"""Load tests of the running services: latency under open-loop load, CPU per request, memory and writes."""
