"""Vector indices: FAISS segments, Milvus, an exact scan."""
