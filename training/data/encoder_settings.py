"""The sections of shop.toml for the encoders, in their own module: other settings then retrain no encoder."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of shop.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextTraining(Section):
    """How the text encoder is trained."""

    base: str = Field("minilm", description="a Hugging Face BERT: hub name or directory")
    mode: Literal["auto", "full", "lora", "frozen"] = Field(
        "auto",
        description="auto tunes the model where there are enough baskets, and publishes it if it finds "
        "more partners of held-out baskets than the frozen one; full and lora always publish the tuned model",
    )
    trainable_layers: int | None = Field(
        None,
        ge=0,
        description="number of top layers to fine-tune; 0 means the whole model. Left out: all on a GPU, "
        "2 on a CPU",
    )
    steps: int | None = Field(
        None,
        ge=0,
        description="left out, as many as go ten times over the pairs, at most 300 on a GPU and 150 on a CPU",
    )
    batch: int = Field(128, ge=2)
    learning_rate: float | None = Field(
        None, gt=0, description="left out: 3e-5 for the whole model, 1e-4 for some layers of it"
    )
    max_tokens: int = Field(64, ge=4, le=512)
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto",
        description="precision of text encoding: auto is bf16 where it is fast, else fp32; int8 is for CPUs, "
        "about 1.4 times as fast as fp32 and less exact, and needs the extra int8",
    )
    projection_steps: int = Field(300, ge=0, description="steps of the projection, which is fitted last")


class ImageTraining(Section):
    """How the image encoder is trained; a shop without images has none."""

    base: str = Field(
        "efficientnet-lite0",
        description='what to start from. A trunk, which stays as it is: "efficientnet-lite0", "timm:NAME" of '
        "the hub, or a directory in timm's format; its texts are read by this shop's text encoder. Or a CLIP "
        'model, which is trained: "small" from scratch, an open_clip "model:pretrained tag", or a directory',
    )
    epochs: int = Field(6, ge=0, description="of a CLIP model; like batch and learning_rate not for a trunk")
    batch: int = Field(64, ge=2, description="small for small shops: the number of steps counts")
    learning_rate: float = Field(5e-4, gt=0)
    projection_steps: int = Field(1000, ge=0, description="steps of the projection, which is fitted last")
