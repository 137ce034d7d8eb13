"""One function that builds the feature rows of training and of serving."""
