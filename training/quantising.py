"""A text encoder's network in eight bits, for processors.

Of every product with weights both sides become whole numbers: weights by output channel, in seven bits since
sums of two products of eight do not fit the sixteen bits that processors without VNNI add them in; what comes
in by one scale and one zero point, measured on the shop's own texts, so that a text's vector depends on no
other text of its batch. Components that stand out are first moved into the weights: SmoothQuant (Xiao et al.,
2023). Where that is not enough, the product stays in float32.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

from services.embedding.eight_bits import FILE, MEAN, REAL, TOKENS
from services.embedding.encoders import TextEncoder, attention, write_settings
from services.errors import FailedPrecondition

try:
    import onnx
    import onnxscript  # noqa: F401 - torch's exporter needs it, and would say so only after a fine-tuning
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
except ModuleNotFoundError as error:
    raise FailedPrecondition(
        "[text] precision = \"int8\" needs the extra int8: pip install 'vitrine[int8]'"
    ) from error

_TEXTS, _BATCH = 256, 16
_ALPHA = 0.75  # how much of what stands out goes into the weights
_NOISE = 0.001  # what is noisier, as some of what comes out of a GELU is, stays in float32
_LEAST = 1e-5

Batch = tuple[np.ndarray, np.ndarray]


def quantise(source: Path, directory: Path, texts: Sequence[str], seed: int = 0) -> None:
    """Write the text encoder of `source`, with a network in eight bits beside its weights, into `directory`.

    Scales are measured on some of `texts`.

    Raises:
        FailedPrecondition: eight bits are enough for nothing in it.
    """
    shutil.copytree(source, directory, dirs_exist_ok=True)
    encoder = TextEncoder(source)
    batches = list(_batches(encoder, _measured(texts, np.random.default_rng(seed))))
    model = AutoModel.from_pretrained(source, dtype=torch.float32, attn_implementation=attention("cpu"))
    _smooth(model.eval(), batches)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        whole = Path(folder) / "model.onnx"
        products = _export(model, whole)
        if not products:  # of none ONNX Runtime would make all
            raise FailedPrecondition(
                '[text] precision = "int8": every product of this encoder would be noisy; leave it out'
            )
        quantize_static(
            whole,
            directory / FILE,
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=products,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    write_settings(directory, replace(encoder.settings, precision="int8"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, of operators that nobody has and of steps that need not be taken."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Mean(nn.Module):
    """What `EightBits` computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=tokens, attention_mask=real).last_hidden_state
        weights = real.unsqueeze(-1).float()
        mean: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return mean


class _Seen:
    """What came into a linear layer: of each component the least, the largest, and the sum of squares."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.rows = layer, 0
        self.low, self.high, self.squares = torch.zeros(3, layer.in_features)

    def __call__(self, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        rows = given[0].flatten(0, -2)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.squares += rows.square().sum(0)
        self.rows += len(rows)

    def inverse(self) -> torch.Tensor:
        """By what components are multiplied so that none stands out; their weights are divided by it."""
        largest = torch.maximum(-self.low, self.high).clamp(min=_LEAST)
        heaviest = self.layer.weight.abs().amax(0).clamp(min=_LEAST)
        return 1 / (largest**_ALPHA / heaviest ** (1 - _ALPHA)).clamp(min=_LEAST)

    def noise(self, inverse: torch.Tensor) -> float:
        """The power of what eight bits take away, evenly spread within a step, for that of what they keep."""
        step = ((self.high * inverse).max() - (self.low * inverse).min()) / 255
        power = (self.squares * inverse.square()).sum() / (self.rows * len(inverse))
        return float(step.square() / 12 / power)


class _Smoothed(nn.Module):
    """A linear layer whose input is multiplied, by component, by what its weights are divided by."""

    def __init__(self, layer: nn.Linear, inverse: torch.Tensor) -> None:
        super().__init__()
        self.inverse = nn.Parameter(inverse)
        layer.weight.data /= inverse
        self.layer = layer

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(seen * self.inverse)
        return made


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Batch]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        batch = next(self._left, None)
        return None if batch is None else dict(zip((TOKENS, REAL), batch, strict=True))


def _measured(texts: Sequence[str], random: np.random.Generator) -> list[str]:
    """Some of the texts, each also cut after one of its words: what people search for is short."""
    some = [texts[at] for at in random.permutation(len(texts))[:_TEXTS].tolist()]
    words = [text.split() for text in some]
    return ["", *some, *(" ".join(mine[: random.integers(len(mine) + 1)]) for mine in words)]


def _batches(encoder: TextEncoder, texts: Sequence[str]) -> Iterator[Batch]:
    ids = sorted(encoder.tokenise(texts).ids, key=len)  # so that little is padding
    for start in range(0, len(ids), _BATCH):
        yield encoder.padded(ids[start : start + _BATCH])


@torch.no_grad()
def _smooth(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Put a `_Smoothed` in the place of every linear layer that eight bits are enough for."""
    seen = {name: _Seen(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    hooks = [one.layer.register_forward_pre_hook(one) for one in seen.values()]
    for tokens, real in batches:
        model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(real))
    for hook in hooks:
        hook.remove()
    for name, one in seen.items():
        inverse = one.inverse()
        if one.rows and one.noise(inverse) <= _NOISE:
            model.set_submodule(name, _Smoothed(one.layer, inverse))


@torch.no_grad()
def _export(model: nn.Module, path: Path) -> list[str]:
    """Write the network for batches of any shape; the names of its products in the `_Smoothed`."""
    # Two texts of three tokens, since torch takes sizes of one for constants.
    example = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.onnx.export(
        _Mean(model).eval(),
        example,
        input_names=[TOKENS, REAL],
        output_names=[MEAN],
        dynamic_shapes=(sizes, sizes),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # noqa: S101 - dynamo's exporter gives one
    program.save(path, external_data=False)
    document = onnx.load(path)
    graph = document.graph
    # They tell in which file each operator was written, whose paths are nobody else's business.
    for part in (
        document,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        part.ClearField("metadata_props")
    onnx.save(document, path)
    weights = {initial.name for initial in graph.initializer}
    smooth = {n.output[0] for n in graph.node if n.op_type == "Mul" and weights.intersection(n.input)}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    return [node.name for node in products if node.input[0] in smooth]
