"""The test suite, with the native threads configured as in the command `vitrine`."""

from services.core import native_threads

native_threads.prepare()  # before any test imports torch, FAISS or transformers
