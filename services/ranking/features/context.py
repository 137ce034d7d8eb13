"""The parts of a bundle and the items that candidate sources and features read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from services.catalog.item_table import ItemTable
from services.ranking.features.tfidf_similarity import TfidfSimilarity
from services.ranking.models.co_occurrence import GraphView
from services.ranking.models.sequence import SequenceView
from services.ranking.models.taste import TasteModel, TasteView
from services.ranking.state.value_codes import AttributeValues


@dataclass(frozen=True)
class RankingContext:
    """An item table, and an item graph and optionally a sequence and a taste model over its rows.

    `attributes` and `numeric_attributes` name the text and number attributes that features read.
    """

    table: ItemTable
    graph: GraphView
    attributes: Sequence[str] = ()
    numeric_attributes: Sequence[str] = ()
    sequence: SequenceView | None = None
    taste_model: TasteModel | None = None

    def with_graph(self, graph: GraphView) -> "RankingContext":
        """The same parts with another graph; what is derived from the other parts is shared."""
        context = replace(self, graph=graph)
        for name in ("attribute_similarity", "title_similarity", "values", "taste"):
            context.__dict__[name] = getattr(self, name)
        return context

    @cached_property
    def attribute_similarity(self) -> TfidfSimilarity:
        """Similarity by the values of attributes."""
        return TfidfSimilarity.of_attributes(self.table, self.attributes)

    @cached_property
    def title_similarity(self) -> TfidfSimilarity:
        """Similarity by the words of titles."""
        return TfidfSimilarity.of_titles(self.table)

    @cached_property
    def values(self) -> AttributeValues:
        """The values of text attributes."""
        return AttributeValues(self.table)

    @cached_property
    def taste(self) -> TasteView | None:
        """The taste model over the rows."""
        return TasteView(self.taste_model, self.table, self.values) if self.taste_model else None
