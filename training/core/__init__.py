"""Progress, stages and metrics. Imports nothing else of training."""
