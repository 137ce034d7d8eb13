"""What sources and features of the ranking service are made over."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.item_table import ItemTable
from services.ranking.graph import GraphView
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
