"""What `shop.toml` may say: which columns hold what, what events weigh, how time is cut."""

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.errors import FieldViolation, InvalidArgument

_TRAINING = ("text", "image", "graph", "sequence", "ranking", "propensity")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ItemColumns(_Section):
    """Columns of the items file; an optional one that is not there is passed over."""

    file: str = Field("", description="the file; empty means the one items.* there is")
    id: str = Field("id", description="required")
    title: str = "title"
    description: str = "description"
    family_id: str = "family_id"
    price: str = Field("price", description="empty means that prices are unknown")
    available_from: str = "available_from"
    available_until: str = "available_until"
    text_attributes: tuple[str, ...] = Field((), description="a value may be a list of texts, in csv as JSON")
    number_attributes: tuple[str, ...] = Field(
        (), description="how high one is, and how near to a person's items, is read: a size, a running number"
    )
    filter_only: tuple[str, ...] = Field(
        (), description="text attributes for filters alone, named with a leading underscore"
    )


class EventColumns(_Section):
    """Columns of the events file; an optional one that is not there is passed over."""

    file: str = Field("", description="the file; empty means the one events.* there is")
    event_id: str = Field("event_id", description="made from the row's content when not there")
    user_id: str = Field("user_id", description="required")
    item_id: str = Field("item_id", description="required")
    session_id: str = "session_id"
    type: str = "type"
    default_type: str = Field("purchase", description="of an event without a type")
    time: str = Field("time", description="required: ISO 8601, a date, or seconds since 1970")
    price: str = "price"
    position: str = "position"
    channel: str = Field("channel", description="where it happened: web, app, store")


class Time(_Section):
    """How exactly the shop knows when things happened."""

    granularity: Literal["hour", "day"] = "hour"


class Split(_Section):
    """The last days of the events, kept out of fitting to choose and to report."""

    test_days: int = Field(
        1, ge=1, description="what the report is judged on; learned from as well, afterwards"
    )


class GraphTraining(_Section):
    """How the item graph is made."""

    trials: int = Field(30, ge=0, description="weightings tried for each relation; 0 keeps the cosine")
    neighbours: int = Field(300, ge=1, description="the edges kept of an item in a relation")


class Task(_Section):
    """What an evaluation asks."""

    targets: tuple[str, ...] = Field((), description="event types to predict; the heaviest when empty")
    queries: dict[Literal["val", "test"], str] = Field({}, description="files of ready-made queries")
    filter: dict[str, str] = Field({}, description="attributes an item must have to be a candidate")
    exclude_bought: bool = Field(False, description="what a person bought before is no candidate")


class TextTraining(_Section):
    """How the text encoder is made."""

    base: str = Field("minilm", description="a Hugging Face BERT: hub name or directory")
    mode: Literal["full", "lora", "frozen"] = "full"
    layers: int = Field(0, ge=0, description="tune only so many of the top layers; 0 means the whole model")
    steps: int = Field(300, ge=0)
    batch: int = Field(128, ge=2)
    learning_rate: float = Field(3e-5, gt=0)
    max_tokens: int = Field(64, ge=4, le=512)
    precision: Literal["auto", "fp32", "bf16", "int8"] = Field(
        "auto",
        description="what texts are encoded in: bf16 where it is fast, else fp32; int8 is for processors, "
        "some 1.4 times as fast as fp32 and less exact, and needs the extra int8",
    )
    head_steps: int = Field(300, ge=0, description="steps of the projection that is fitted last")


class ImageTraining(_Section):
    """How the image encoder is made; a shop without photographs has none."""

    base: str = Field(
        "small",
        description='"small", trained from scratch, or an open_clip "model:pretrained tag", or a directory',
    )
    epochs: int = Field(6, ge=0)
    batch: int = Field(64, ge=2, description="small for small shops: the number of steps counts")
    learning_rate: float = Field(5e-4, gt=0)
    head_steps: int = Field(300, ge=0, description="steps of the projection that is fitted last")


class SequenceTraining(_Section):
    """How the model of what comes next is made."""

    epochs: int = Field(12, ge=0, description="0 means none")
    batch: int = Field(256, ge=1, description="people at once")
    negatives: int = Field(2048, ge=1, description="items drawn for each batch")
    learning_rate: float = Field(3e-3, gt=0)
    width: int = Field(64, ge=2)
    dropout: float = Field(0.2, ge=0, lt=1)
    delta_dropout: float = Field(
        0.3, ge=0, lt=1, description="the share of items shown without their own delta, as new ones are"
    )


class RankingTraining(_Section):
    """How the CTR head and the reranker are made."""

    days: int = Field(2, ge=2, description="the last days, whose baskets they learn from")
    queries: int = Field(12_000, ge=1, description="the most baskets, and pages shown, they learn from")
    candidates: int = Field(200, ge=10, description="the candidates of a basket that are kept as rows")
    bare: float = Field(
        0.25,
        ge=0,
        le=1,
        description="the share of baskets of people with a past that are asked for without a session",
    )
    unsold: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="the share of rows shown without what people did with the item, for the sake of new ones",
    )
    judged: int = Field(
        1500, ge=0, description="the most baskets that the report is judged on; 0 for no judgement"
    )
    trees: int = Field(250, ge=1, description="the most trees of the reranker")
    ctr_epochs: int = Field(3, ge=1)


class PropensityTraining(_Section):
    """How the chance that a person buys is learned."""

    days: tuple[Annotated[int, Field(ge=1, le=365)], ...] = Field(
        (7, 30), description="within how many days; one for which the events are of too few days is left out"
    )
    windows: int = Field(4, ge=1, description="the past moments learned from, beside the one judged by")
    people: int = Field(50_000, ge=1, description="the most people learned from")


class ShopSettings(_Section):
    """A shop's description."""

    items: ItemColumns = ItemColumns()
    events: EventColumns = EventColumns()
    event_types: dict[str, float] = Field(
        {"purchase": 1.0}, description="name to weight as an interest; 0 is only shown"
    )
    time: Time = Time()
    split: Split = Split()
    task: Task = Task()
    text: TextTraining = TextTraining()
    image: ImageTraining = ImageTraining()
    graph: GraphTraining = GraphTraining()
    sequence: SequenceTraining = SequenceTraining()
    ranking: RankingTraining = RankingTraining()
    propensity: PropensityTraining = PropensityTraining()

    @model_validator(mode="after")
    def _types_exist(self) -> "ShopSettings":
        known = self.event_types
        if not known or max(known.values()) <= 0 or min(known.values()) < 0:
            raise ValueError("event_types needs weights of 0 and more, one above 0 at least")
        for name in (*self.task.targets, self.events.default_type):
            if name not in known:
                raise ValueError(f"{name!r} is none of event_types")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """The event types that count as bought."""
        weights = self.event_types
        return self.task.targets or (max(weights, key=lambda name: weights[name]),)


def read_settings(path: Path | None) -> ShopSettings:
    """Read a shop.toml; the defaults when there is none.

    Raises:
        InvalidArgument: names the file and the key.
    """
    return ShopSettings() if path is None else _validated(path, {})


def with_training(settings: ShopSettings, path: Path) -> ShopSettings:
    """The settings with the keys of a TOML file in place of theirs: how much is trained, not what is read.

    Raises:
        InvalidArgument: names the file and the key.
    """
    return _validated(path, settings.model_dump(exclude_unset=True), _TRAINING)


def _validated(path: Path, known: dict[str, Any], sections: Collection[str] | None = None) -> ShopSettings:
    """The file's keys over `known`, in `sections` alone if they are given."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
        if sections is not None and (other := sorted(said.keys() - set(sections))):
            allowed = ", ".join(sections)
            raise InvalidArgument.of(f"{path.name}: {other[0]}", f"must be one of {allowed}")
        for name, section in said.items():
            before = known.get(name, {})
            known[name] = {**before, **section} if isinstance(section, dict) else section
        return ShopSettings.model_validate(known)
    except OSError as error:
        raise InvalidArgument.of(str(path), f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument.of(str(path), f"is no TOML: {error}") from None
    except ValidationError as error:
        raise InvalidArgument(
            FieldViolation(f"{path.name}: {'.'.join(map(str, e['loc'])) or 'event_types'}", e["msg"])
            for e in error.errors()
        ) from None
