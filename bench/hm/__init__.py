"""The H&M benchmark: real purchases, texts and photographs, which stay outside the repository."""
