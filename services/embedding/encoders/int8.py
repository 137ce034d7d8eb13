"""An int8 BERT on a CPU by ONNX Runtime; `training/encoders/quantization.py` writes its file.

The input is token ids; the output is means of hidden states.
"""

from pathlib import Path

import numpy as np

from services.core.errors import FailedPrecondition

FILE = "model.int8.onnx"
TOKENS, REAL, MEAN = "tokens", "real", "mean"


class Int8Model:
    """The network of `FILE` in a directory. Any thread may call it; each call uses one core.

    Raises:
        FailedPrecondition: ONNX Runtime is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import onnxruntime  # noqa: PLC0415 - only this precision needs it
        except ModuleNotFoundError as error:
            raise FailedPrecondition(
                f"{directory} has precision int8, which needs the extra int8: pip install 'vitrine[int8]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            directory / FILE, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Means float32 (B, D) of the last hidden states over `tokens` with `real` 1, both int64 (B, T)."""
        mean: np.ndarray = self._session.run([MEAN], {TOKENS: tokens, REAL: real})[0]
        return mean
