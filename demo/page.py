"""Shows a tour's sections as one HTML page that needs nothing else: pictures are data URIs.

Everything that comes from outside is escaped. Knows nothing of where the sections come from.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from demo.client import Card, Section, Strip

_PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
_SIGNATURES = ((b"\x89PNG", "image/png"), (b"RIFF", "image/webp"), (b"GIF8", "image/gif"))


def render(sections: Sequence[Section], address: str) -> str:
    """The page, UTF-8 text."""
    links = "".join(f'<li><a href="#s{n}">{escape(s.title)}</a></li>' for n, s in enumerate(sections))
    body = "\n".join(_section(n, section) for n, section in enumerate(sections))
    return _PAGE.substitute(address=escape(address), links=links, sections=body)


def image_card(path: Path) -> Card:
    """The image of a query as a card."""
    return Card(path.name, path.stem.replace("-", " "), None, path.read_bytes())


def _section(number: int, section: Section) -> str:
    strips = "\n".join(_strip(strip) for strip in section.strips)
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in section.remarks)
    return f"""<section id="s{number}">
<h2>{escape(section.title)}</h2>
<p>{escape(section.prose)}</p>
<pre tabindex="0"><code>{escape(section.call)}</code></pre>
{strips}
<ul class="remarks">{remarks}</ul>
</section>"""


def _strip(strip: Strip) -> str:
    cards = "\n".join(_card(card) for card in strip.cards)
    size = "" if any(card.sources for card in strip.cards) else " small"
    return f'<h3>{escape(strip.label)}</h3>\n<div class="cards{size}">\n{cards}\n</div>'


def _card(card: Card) -> str:
    chips = "".join(
        f'<span class="chip {escape(source, quote=True)}">{escape(source)}</span>' for source in card.sources
    )
    price = "" if card.price is None else f'<span class="price">{card.price:,.2f}</span>'
    new = ' class="card new"' if card.is_the_new_one else ' class="card"'
    return f"""<article{new} title="{escape(card.item_id, quote=True)}">
{_image(card)}
<h4>{escape(card.title)}</h4>
<p>{price}{chips}</p>
</article>"""


def _image(card: Card) -> str:
    if not card.image:
        return '<div class="blank"></div>'
    media_type = next((k for start, k in _SIGNATURES if card.image.startswith(start)), "image/jpeg")
    data = base64.b64encode(card.image).decode()
    return f'<img alt="" loading="lazy" src="data:{media_type};base64,{data}">'
