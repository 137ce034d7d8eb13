"""SQL databases and files that outlive the process: engine, locks, errors, health of writes."""
