"""Quantizes a text encoder's network to int8 for CPUs.

Both sides of a product with weights become integers. Weights are quantized per output channel to seven bits,
because sums of two products of eight bits overflow the sixteen bits of processors without VNNI. Inputs have
one scale and one zero point, measured on the shop's texts, so that a text's vector does not depend on other
texts of its batch. Outlier components are first moved into the weights: SmoothQuant (Xiao et al., 2023). If
that is not precise enough, the product stays in float32.
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

from services.core.errors import FailedPrecondition
from services.embedding.encoders.encoders import TextEncoder, attention_implementation, write_settings
from services.embedding.encoders.int8 import FILE, MEAN, REAL, TOKENS

try:
    import onnx
    import onnxscript  # noqa: F401 - torch's exporter needs it, and would fail only after the fine-tuning
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
except ModuleNotFoundError as error:
    raise FailedPrecondition(
        "[text] precision = \"int8\" needs the extra int8: pip install 'vitrine[int8]'"
    ) from error

_TEXTS, _BATCH = 256, 16
_ALPHA = 0.75  # the share of outliers that moves into the weights
_NOISE = 0.001  # noisier products, such as some after a GELU, stay in float32
_MIN_RANGE = 1e-5

Batch = tuple[np.ndarray, np.ndarray]


def quantize(directory: Path, source: Path, texts: Sequence[str], seed: int = 0) -> None:
    """Write the text encoder of `source` into `directory`, with an int8 network next to its weights.

    Scales are measured on a sample of `texts`.

    Raises:
        FailedPrecondition: int8 is too imprecise for all products.
    """
    shutil.copytree(source, directory, dirs_exist_ok=True)
    encoder = TextEncoder(source)
    batches = list(_batches(encoder, _calibration_texts(texts, np.random.default_rng(seed))))
    model = AutoModel.from_pretrained(
        source, dtype=torch.float32, attn_implementation=attention_implementation("cpu")
    )
    _smooth(model.eval(), batches)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        exported = Path(folder) / "model.onnx"
        products = _export(model, exported)
        if not products:  # an empty list would make ONNX Runtime quantize all
            raise FailedPrecondition(
                '[text] precision = "int8": too imprecise for every layer of this encoder; remove it'
            )
        quantize_static(
            exported,
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
    """Suppress the exporters' warnings about unused operators and optional steps."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


class _Mean(nn.Module):
    """The mean of the hidden states over a text's tokens, which the int8 encoder computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=tokens, attention_mask=real).last_hidden_state
        weights = real.unsqueeze(-1).float()
        mean: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1)
        return mean


class _InputRange:
    """Statistics of a linear layer's inputs, by component: minimum, maximum and sum of squares."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.rows = layer, 0
        self.low, self.high, self.squares = torch.zeros(3, layer.in_features)

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.squares += rows.square().sum(0)
        self.rows += len(rows)

    def inverse(self) -> torch.Tensor:
        """The factor of each input component that removes outliers; the weights are divided by it."""
        largest = torch.maximum(-self.low, self.high).clamp(min=_MIN_RANGE)
        heaviest = self.layer.weight.abs().amax(0).clamp(min=_MIN_RANGE)
        return 1 / (largest**_ALPHA / heaviest ** (1 - _ALPHA)).clamp(min=_MIN_RANGE)

    def noise(self, inverse: torch.Tensor) -> float:
        """The power of the rounding error of eight bits, relative to the power of the inputs."""
        step = ((self.high * inverse).max() - (self.low * inverse).min()) / 255
        power = (self.squares * inverse.square()).sum() / (self.rows * len(inverse))
        return float(step.square() / 12 / power)


class _SmoothedLinear(nn.Module):
    """A linear layer whose inputs are scaled by component; its weights are divided by the same factors."""

    def __init__(self, layer: nn.Linear, inverse: torch.Tensor) -> None:
        super().__init__()
        self.inverse = nn.Parameter(inverse)
        layer.weight.data /= inverse
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(inputs * self.inverse)
        return outputs


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[Batch]) -> None:
        self._left = iter(batches)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        batch = next(self._left, None)
        return None if batch is None else dict(zip((TOKENS, REAL), batch, strict=True))


def _calibration_texts(texts: Sequence[str], generator: np.random.Generator) -> list[str]:
    """A sample of the texts, each also cut after a random word, because search queries are short."""
    sample = [texts[index] for index in generator.permutation(len(texts))[:_TEXTS].tolist()]
    words = [text.split() for text in sample]
    return ["", *sample, *(" ".join(part[: generator.integers(len(part) + 1)]) for part in words)]


def _batches(encoder: TextEncoder, texts: Sequence[str]) -> Iterator[Batch]:
    ids = sorted(encoder.tokenize(texts).ids, key=len)  # to minimize padding
    for start in range(0, len(ids), _BATCH):
        yield encoder.pad(ids[start : start + _BATCH])


@torch.no_grad()
def _smooth(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Replace every linear layer for which eight bits are precise enough by a `_SmoothedLinear`."""
    ranges = {
        name: _InputRange(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }
    hooks = [input_range.layer.register_forward_pre_hook(input_range) for input_range in ranges.values()]
    for tokens, real in batches:
        model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(real))
    for hook in hooks:
        hook.remove()
    for name, input_range in ranges.items():
        inverse = input_range.inverse()
        if input_range.rows and input_range.noise(inverse) <= _NOISE:
            model.set_submodule(name, _SmoothedLinear(input_range.layer, inverse))


@torch.no_grad()
def _export(model: nn.Module, path: Path) -> list[str]:
    """Export the network for batches of any shape; return the names of the `_SmoothedLinear` products."""
    # Two texts of three tokens, because torch treats sizes of one as constants.
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
    assert program is not None  # noqa: S101 - dynamo's exporter returns a program
    program.save(path, external_data=False)
    document = onnx.load(path)
    graph = document.graph
    # Remove the metadata, which contains paths of this machine.
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
