"""What sources and features of the ranking service are made over."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from services.item_table import ItemTable
from services.ranking.graph import GraphView
from services.ranking.likeness import Likeness
from services.ranking.sequence import SequenceView


@dataclass(frozen=True)
class Basis:
    """An item table, and over its rows an item graph and a sequence model, which may be missing.

    `attributes` and `numbers` name the text and number attributes that are read.
    """

    table: ItemTable
    graph: GraphView
    attributes: Sequence[str] = ()
    numbers: Sequence[str] = ()
    sequence: SequenceView | None = None

    @cached_property
    def alike(self) -> Likeness:
        """Likeness by attributes."""
        return Likeness.of_attributes(self.table, self.attributes)

    @cached_property
    def titles(self) -> Likeness:
        """Likeness by the words of titles."""
        return Likeness.of_titles(self.table)
