"""Training: turns a shop directory into a bundle, with the services' models and none of their servers."""
