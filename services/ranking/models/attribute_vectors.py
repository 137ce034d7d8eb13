"""The attribute values of items as vectors, for models whose first layer embeds them.

Values are hashed into columns (Weinberger et al., 2009): a new value needs no vocabulary, and two values
share a column now and then.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from services.catalog.item_table import ItemTable

ATTRIBUTES = "attributes"
"""The name of the space, next to those of the encoders."""
DIMENSION = 256


def attribute_vectors(table: ItemTable, rows: np.ndarray, attributes: Sequence[str]) -> np.ndarray:
    """Vectors of table rows, int64 (R,): float32 (R, 256), of unit length, zeros without a value.

    Each value of the text `attributes` counts in the column of its hash.
    """
    vectors = np.zeros((len(rows), DIMENSION), np.float32)
    for attribute in attributes:
        entries = table.texts_of_rows(attribute, rows)
        if entries is None:
            continue
        codes, vocabulary = entries
        column_of = np.zeros(max(vocabulary.values(), default=0) + 1, np.int64)
        texts = list(vocabulary)  # in the order of their codes
        for code in np.unique(codes[codes >= 0]).tolist():
            column_of[code] = zlib.crc32(f"{attribute}={texts[code]}".encode()) % DIMENSION
        row, place = np.nonzero(codes >= 0)
        np.add.at(vectors, (row, column_of[codes[row, place]]), 1)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(np.divide(vectors, length, out=vectors, where=length > 0))
