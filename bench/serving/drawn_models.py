"""Models of the real shapes, with drawn parameters: what they answer means nothing, what they cost is real.

Each function writes one component of a bundle, by the product's own writers.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors.torch import save_file

from bench.serving.drawn_catalog import ATTRIBUTES, SPACES
from bench.serving.drawn_events import EVENT_TYPES
from services.catalog.candidate_sources import NAMES
from services.catalog.item_table import ItemTable
from services.embedding.encoders.encoders import ImageSettings, TextSettings, write_settings
from services.ranking.features.context import RankingContext
from services.ranking.features.feature_matrix import CANDIDATE_COLUMNS, Features
from services.ranking.models.co_occurrence import GraphView, ItemGraph
from services.ranking.models.ctr import CtrModel, CtrSettings, write_ctr
from services.ranking.models.first_phase import COLUMNS as FIRST_PHASE_COLUMNS
from services.ranking.models.first_phase import FirstPhase, write_first_phase
from services.ranking.models.linear import ConditionalLogit
from services.ranking.models.reranker import RerankerModel, write_reranker
from services.ranking.models.scaler import FeatureScaler
from services.ranking.models.sequence import SequenceNet, SequenceSettings, write_sequence
from services.ranking.scoring.scorer import ctr_column
from training.core.base_models import MINILM
from training.encoders.text_encoder import save_frozen

# As training keeps on H&M: 39 to 81 trees of at most 63 leaves, of lists of 200 candidates.
TREES, LEAVES = 60, 63
_ROWS = 40_000
_LIST = 200
_DEPTH = 300
_CLIP: dict[str, Any] = {
    "embed_dim": SPACES["image"],
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2},
}
"""The shape of the image encoder that `vitrine train` fits by default."""


def write_encoders(staged: Path) -> None:
    """MiniLM as it was pretrained, and an image encoder with drawn weights."""
    save_frozen(staged / "text", MINILM, TextSettings(64))
    torch.manual_seed(0)
    directory = staged / "image"
    directory.mkdir()
    model = open_clip.CLIP(**_CLIP)
    save_file(
        {name: weights.contiguous() for name, weights in model.state_dict().items()},
        directory / "open_clip_model.safetensors",
    )
    config = {"model_cfg": _CLIP, "preprocess_cfg": asdict(PreprocessCfg(size=64))}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    write_settings(directory, ImageSettings())


def write_rankers(staged: Path, graph: ItemGraph) -> None:
    """A CTR head, a reranker that reads every feature and the head's scores, and a first phase."""
    table = ItemTable()
    features = Features(RankingContext(table, GraphView(graph, table), tuple(ATTRIBUTES)))
    torch.manual_seed(0)
    head = CtrSettings(
        spaces=SPACES,
        types=tuple(EVENT_TYPES),
        columns=CANDIDATE_COLUMNS,
        scales=FeatureScaler.plain(len(CANDIDATE_COLUMNS)),
    )
    (staged / "ctr").mkdir()
    write_ctr(staged / "ctr", CtrModel(head))
    columns = (*features.names, *(ctr_column(name) for name in EVENT_TYPES))
    random = np.random.default_rng(0)
    weight = random.normal(0, 0.3, len(columns))
    choice = ConditionalLogit(columns, FeatureScaler.plain(len(columns)), weight.tolist())
    (staged / "reranker").mkdir()
    write_reranker(staged / "reranker", RerankerModel(choice, _trees(random, choice)))
    write_first_phase(staged / "reranker", drawn_first_phase())


def drawn_first_phase() -> FirstPhase:
    """A first phase of the default depth that adds up the scores of the sources."""
    scales = FeatureScaler.plain(len(FIRST_PHASE_COLUMNS))
    weight = [float(name in NAMES) for name in FIRST_PHASE_COLUMNS]
    return FirstPhase(ConditionalLogit(FIRST_PHASE_COLUMNS, scales, weight), _DEPTH)


def write_sequence_model(staged: Path, item_hashes: np.ndarray) -> None:
    """A sequence model with deltas for the items, and embeddings of all their attribute values."""
    torch.manual_seed(0)
    values = [(name, f"{name} {code}") for name, size in ATTRIBUTES.items() for code in range(size)]
    net = SequenceNet(SequenceSettings(SPACES, values), np.sort(item_hashes))
    write_sequence(staged / "sequence", net)


def _trees(random: np.random.Generator, choice: ConditionalLogit) -> lightgbm.Booster:
    """LambdaMART fitted to random columns; the columns have the long tails of real ones."""
    matrix = random.standard_exponential((_ROWS, len(choice.columns)), np.float32)
    matrix[random.random(matrix.shape, np.float32) < 0.3] = 0  # noqa: PLR2004 - as sparse as real ones
    score = choice.terms(matrix).sum(1) + np.sin(3 * matrix[:, :10]).sum(1)
    label = score > np.quantile(score, 0.97)
    data = lightgbm.Dataset(matrix, label.astype(int), group=[_LIST] * (_ROWS // _LIST))
    parameters = {
        "objective": "lambdarank",
        "num_leaves": LEAVES,
        "min_data_in_leaf": 20,
        "learning_rate": 0.05,
        "verbosity": -1,
        "num_threads": 1,
        "seed": 0,
        "deterministic": True,
    }
    return lightgbm.train(parameters, data, TREES)
