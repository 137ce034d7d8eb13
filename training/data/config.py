"""The schema of `shop.toml`: columns, event weights, time split and training settings."""

import math
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from training.data.encoder_settings import ImageTraining, Section, TextTraining

MIN_RANKING_DAYS = 2
"""The last one evaluates what the others teach."""


class _TableColumns(Section):
    """The format of a table file; empty settings are detected."""

    separator: str = Field("", description="between cells: a comma, a semicolon, a tab, '::'")
    encoding: str = Field("", description="a Python codec: utf-8, utf-16, cp1252, gbk")
    quote: str = Field('"', max_length=1, description="around cells; empty means that there is none")
    columns: tuple[str, ...] = Field((), description="the names of the columns of a file without a header")
    decimal: Literal["", ".", ","] = Field(
        "", description="the decimal mark of prices and numbers; detected by the whole column when left out"
    )
    time_format: str = Field(
        "",
        description='of times in none of the accepted forms, as for strptime: "%d/%m/%Y %H:%M"; '
        "a time without a zone is UTC",
    )

    @field_validator("encoding")
    @classmethod
    def _is_text_encoding(cls, value: str) -> str:
        try:
            "a".encode(value or "utf-8")
        except (LookupError, ValueError):
            raise ValueError(
                f"{value!r} is not a text encoding of Python: write for example utf-8, cp1252 or "
                "gbk, or remove it to detect the encoding"
            ) from None
        return value

    @field_validator("columns")
    @classmethod
    def _names_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        repeated = [name for name, count in Counter(value).items() if count > 1]
        if repeated:
            raise ValueError(f"{repeated[0]!r} is repeated: each column needs its own name")
        return value


class ItemColumns(_TableColumns):
    """Columns of the items file.

    A column that shop.toml names must exist; a missing default column is noted and skipped.
    """

    file: str = Field("", description="the file, folder or glob; empty means the one items.* there is")
    id: str = Field("id", description="required")
    title: str = "title"
    description: str = "description"
    family_id: str = "family_id"
    price: str = Field("price", description="empty means that prices are unknown")
    available_from: str = "available_from"
    available_until: str = "available_until"
    image: str = Field("", description="file names below images/, several between , | or ; or as JSON")
    image_url: str = Field(
        "",
        description="addresses of images; training downloads none and uses the file named as the last part",
    )
    text_attributes: tuple[str, ...] = Field((), description="a value may be a list of texts, in csv as JSON")
    number_attributes: tuple[str, ...] = Field(
        (),
        description="the ranker uses their rank in the catalog and their distance to the user's items",
    )
    filter_only: tuple[str, ...] = Field(
        (), description="text attributes for filters alone, named with a leading underscore"
    )
    separators: dict[str, str] = Field(
        {}, description='the separator of several texts in one value, by text attribute: tags = ","'
    )

    @model_validator(mode="after")
    def _separators_part_attributes(self) -> "ItemColumns":
        for name, separator in self.separators.items():
            if name not in (*self.text_attributes, *self.filter_only):
                raise ValueError(f"separators: {name!r} is none of text_attributes and filter_only")
            if not separator:
                raise ValueError(f"separators: that of {name!r} is empty")
        return self


class EventColumns(_TableColumns):
    """Columns of the events file.

    A column that shop.toml names must exist; a missing default column is noted and skipped.
    """

    file: str = Field("", description="the file, folder or glob; empty means the one events.* there is")
    event_id: str = Field("event_id", description="a hash of the row's content when missing")
    user_id: str = Field("user_id", description="required")
    item_id: str = Field("item_id", description="required")
    session_id: str = "session_id"
    type: str = Field("type", description="empty means that every event is of default_type")
    default_type: str = Field(
        "",
        description="of an event without a type: the heaviest of event_types if there is no type column; "
        "with a type column, an event without a type is dropped unless this is set",
    )
    time: str = Field(
        "time",
        description="required: ISO 8601, 20261115, 20261115093000, or a number of seconds, milli-, micro- or "
        "nanoseconds since 1970; another form needs time_format",
    )
    price: str = "price"
    quantity: str = Field("quantity", description="0 or less is a cancellation or return, not a purchase")
    position: str = "position"
    channel: str = Field("channel", description="where it happened: web, app, store")
    guests: tuple[str, ...] = Field(
        (), description='user ids of anonymous users, such as "0" or "guest": their events are dropped'
    )


class Source(Section):
    """Where the files come from."""

    preset: str = Field("", description="the system that wrote the files: see training/data/presets")


class Time(Section):
    """The precision of the event times."""

    granularity: Literal["10min", "hour", "day"] = Field(
        "hour",
        description="how often the statistics of items are computed anew: 10min for what ages within hours, "
        "such as news; with day, nothing of the same day counts",
    )


class Split(Section):
    """The last days of the events, held out for model selection and evaluation."""

    test_days: int | None = Field(
        None,
        ge=1,
        description="number of last days for the evaluation; the final models are fitted on them too. Left "
        "out, as many as hold 1,000 baskets, or a quarter of those that the rankers learn from",
    )


class GraphTraining(Section):
    """How the item graph is built."""

    trials: int = Field(
        30, ge=0, description="number of weightings to try for each relation; 0 uses the cosine"
    )
    neighbors: int = Field(300, ge=1, description="maximum number of edges of an item in a relation")


class Evaluation(Section):
    """The queries of an evaluation."""

    targets: tuple[str, ...] = Field((), description="event types to predict; the heaviest when empty")
    queries: dict[Literal["val", "test"], str] = Field({}, description="files of ready-made queries")
    filter: dict[str, str] = Field({}, description="attributes an item must have to be a candidate")
    exclude_purchased: bool = Field(False, description="items that the user bought before are no candidates")


class SequenceTraining(Section):
    """How the sequence model is trained."""

    epochs: int = Field(12, ge=0, description="0 means none")
    batch: int = Field(256, ge=1, description="number of users in a batch")
    negatives: int = Field(2048, ge=1, description="number of sampled negative items for each batch")
    learning_rate: float = Field(3e-3, gt=0)
    embedding_size: int = Field(64, ge=2)
    dropout: float = Field(0.2, ge=0, lt=1)
    id_embedding_dropout: float = Field(
        0.3, ge=0, lt=1, description="share of items trained without their own embedding, like new items"
    )


class TasteTraining(Section):
    """How the taste model is learned from impressions."""

    users: int = Field(50_000, ge=0, description="maximum number of users to learn from; 0 means no model")


class RankingTraining(Section):
    """How the CTR head and the reranker are trained."""

    ranking_days: int | None = Field(
        None,
        ge=MIN_RANKING_DAYS,
        description="number of last days whose baskets are training examples. Left out, as many as have "
        "4,000 baskets, or half of all (of few, three quarters), but at least 2",
    )
    max_queries: int = Field(12_000, ge=1, description="maximum number of baskets")
    max_pages: int = Field(12_000, ge=1, description="maximum number of logged pages")
    candidates_per_query: int | None = Field(
        None,
        ge=10,
        description="number of candidates kept per basket. Left out, 200, or up to 1,000 if baskets are few",
    )
    no_session_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of baskets of users with a history that are queried without a session",
    )
    cold_start_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of rows trained without the item's interactions, for the sake of new items",
    )
    eval_queries: int = Field(
        1500, ge=0, description="maximum number of baskets for the report; 0 skips the evaluation"
    )
    trees: int = Field(250, ge=1, description="maximum number of trees of the reranker")
    ctr_epochs: int = Field(3, ge=1)


class PropensityTraining(Section):
    """How the purchase propensity is learned."""

    days: tuple[Annotated[int, Field(ge=1, le=365)], ...] = Field(
        (7, 30), description="horizons in days; a horizon for which the events cover too few days is skipped"
    )
    windows: int = Field(
        4, ge=1, description="number of past points in time for training, besides the one for evaluation"
    )
    users: int = Field(50_000, ge=1, description="maximum number of users for training")


class ShopConfig(Section):
    """A shop's description."""

    source: Source = Source()
    items: ItemColumns = ItemColumns()
    events: EventColumns = EventColumns()
    event_types: dict[str, float] = Field(
        {"purchase": 1.0}, description="weight of each event type as an interest; 0 for impressions"
    )
    time: Time = Time()
    split: Split = Split()
    task: Evaluation = Evaluation()
    text: TextTraining = TextTraining()
    image: ImageTraining = ImageTraining()
    graph: GraphTraining = GraphTraining()
    sequence: SequenceTraining = SequenceTraining()
    taste: TasteTraining = TasteTraining()
    ranking: RankingTraining = RankingTraining()
    propensity: PropensityTraining = PropensityTraining()

    @model_validator(mode="after")
    def _types_exist(self) -> "ShopConfig":
        types = self.event_types
        weights = types.values()
        if not all(0 <= weight < math.inf for weight in weights) or max(weights, default=0) <= 0:
            raise ValueError("event_types needs weights of at least 0, and at least one above 0")
        references = [("task.targets", name) for name in self.task.targets]
        if self.events.default_type:
            references.append(("events.default_type", self.events.default_type))
        for key, name in references:
            if name not in types:
                raise ValueError(f"{key}: {name!r} is not one of event_types, which are {', '.join(types)}")
        return self

    @property
    def default_type(self) -> str:
        """The type of an event without one."""
        return self.events.default_type or self.heaviest_type

    @property
    def heaviest_type(self) -> str:
        """The event type of the largest weight; of equal ones the first."""
        return max(self.event_types, key=lambda name: self.event_types[name])

    @property
    def targets(self) -> tuple[str, ...]:
        """The event types that count as a purchase."""
        return self.task.targets or (self.heaviest_type,)
