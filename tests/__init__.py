"""The test suite, with the native threads configured as in the command `vitrine`."""

import pytest

from services.core import native_threads

native_threads.prepare()  # before any test imports torch, FAISS or transformers
# Failed assertions of the support modules say what was compared, like those of tests.
pytest.register_assert_rewrite("tests.support")
