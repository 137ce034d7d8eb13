"""Search against bare FAISS, hnswlib and usearch."""
