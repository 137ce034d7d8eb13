"""Shows a tour's sections in the terminal. Knows nothing of where they come from."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from demo.client import Section, Strip


def show(section: Section, console: Console) -> None:
    """Print a section: what was asked, then a table for each strip of cards."""
    console.rule(f"[bold]{escape(section.title)}")
    console.print(Text(section.prose, style="italic"))
    console.print(Text(f"$ {section.call}", style="cyan"), soft_wrap=True)
    for strip in section.strips:
        console.print(_table(strip))
    for remark in section.remarks:
        console.print(Text(remark, style="dim"))
    console.print()


def _table(strip: Strip) -> Table:
    table = Table(title=Text(strip.label), title_justify="left", box=None, pad_edge=False)
    table.add_column("", justify="right", style="dim")
    table.add_column("item", overflow="fold")
    table.add_column("title", ratio=1)
    table.add_column("price", justify="right")
    table.add_column("sources")
    for rank, card in enumerate(strip.cards, 1):
        price = "" if card.price is None else f"{card.price:.2f}"
        style = "bold green" if card.is_the_new_one else ""
        table.add_row(
            str(rank), Text(card.item_id), Text(card.title), price, Text(" ".join(card.sources)), style=style
        )
    return table
