"""Published logs of news pages and clicks, MIND and EB-NeRD, which stay outside the repository."""
