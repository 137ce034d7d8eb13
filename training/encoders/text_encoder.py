"""The text encoder: a Hugging Face BERT, fine-tuned on pairs of items that users engage with together."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, get_cosine_schedule_with_warmup

from services.embedding.encoders.encoders import TextSettings, attention_implementation, write_settings
from training.core.base_models import locate
from training.core.progress import track
from training.data.encoder_settings import TextTraining
from training.encoders.contrastive import pair_loss
from training.examples.positive_pairs import PositivePairs

_LORA_RANK = 16


def save_frozen(directory: Path, base: str, settings: TextSettings) -> None:
    """Write a pretrained encoder unchanged into `directory`."""
    name = locate(base)
    AutoTokenizer.from_pretrained(name).save_pretrained(directory)
    AutoModel.from_pretrained(name, dtype=torch.float32).save_pretrained(directory)
    write_settings(directory, settings)


def fine_tune(
    directory: Path,
    base: str,
    settings: TextSettings,
    training: TextTraining,
    texts: list[str],
    pairs: PositivePairs,
    seed: int = 0,
) -> None:
    """Fine-tune a pretrained encoder on pairs of `texts` and write it into `directory`.

    In-batch softmax with a popularity correction, AdamW, linear warm-up and cosine decay; bfloat16 autocast
    if the processor supports it.

    Raises:
        ValueError: `training` leaves out a number; `text_effort.with_effort` fills them in.
    """
    steps, learning_rate = training.steps, training.learning_rate
    if steps is None or learning_rate is None:
        raise ValueError("training has numbers left out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    tokenizer = AutoTokenizer.from_pretrained(locate(base))
    # No dropout: on a CPU its random numbers take longer than the products, and few steps need none.
    model = AutoModel.from_pretrained(
        locate(base),
        dtype=torch.float32,  # fine-tune float16 and bfloat16 checkpoints in full precision
        attn_implementation=attention_implementation(device),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = _trainable(model.to(device), training)
    rows = np.unique(pairs.item)
    encoded = tokenizer([texts[i] for i in rows], truncation=True, max_length=settings.max_tokens)
    ids = dict(zip(rows.tolist(), encoded["input_ids"], strict=True))
    log_share = torch.from_numpy(np.log(np.maximum(pairs.share, 1e-9))).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    low = settings.precision == "bf16"
    model.train()
    for _ in track(range(steps), "text encoder"):
        left, right = pairs.draw(training.batch, generator)
        # Both sides in one forward pass, each distinct item once.
        items, place = np.unique(np.concatenate([left, right]), return_inverse=True)
        batch = tokenizer.pad({"input_ids": [ids[i] for i in items.tolist()]}, return_tensors="pt")
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=low):
            hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        vectors = normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)[torch.from_numpy(place).to(device)]
        partner = torch.from_numpy(right).to(device)
        loss = pair_loss(vectors[: len(left)], vectors[len(left) :], partner, log_share[partner])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    if training.mode == "lora":
        model = model.merge_and_unload()
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    write_settings(directory, settings)


def _trainable(model: Any, training: TextTraining) -> Any:
    """The model with gradients for the trained parameters only: its top layers, or LoRA adapters."""
    layers = model.encoder.layer
    first_trainable = len(layers) - training.trainable_layers if training.trainable_layers else 0
    if training.mode == "lora":
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - only this mode needs it

        selected = list(range(first_trainable, len(layers)))
        config = LoraConfig(
            r=_LORA_RANK,
            lora_alpha=2 * _LORA_RANK,
            target_modules=["query", "key", "value", "dense"],
            layers_to_transform=selected,
            layers_pattern="layer",
        )
        return get_peft_model(model, config)
    if first_trainable:
        for part in (model.embeddings, *layers[:first_trainable]):
            part.requires_grad_(False)
    return model
