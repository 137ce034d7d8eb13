"""The H&M benchmark: real purchases, texts and images, which stay outside the repository."""
