"""`python -m demo.tour`: shows what a running Vitrine does, in the terminal and as one HTML page.

Needs a gateway's address and the shop directory it was trained on. Adds one item to the
gateway's catalogue, and takes away the one that an earlier tour added.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import grpc
from rich.console import Console
from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from demo import page, terminal
from demo.cast import a_session, bought_by, some_buyers
from demo.client import SERVICE, Gateway, Section, Strip, degraded, session_of
from demo.drawing import Sketch, photograph
from training.dataset import Shop, read_shop

PEOPLE = 3
SHOWN = 12
MOST = 500
"""The longest page that can be asked for."""
HISTORY = 6
SEARCHES = ("red striped mug", "something elegant and black for an evening out", "a floral bag for the beach")
NEW_ID = "tour-night-sky-mug"
_QUERY = Sketch("handbag", "yellow", "floral", "bohemian", (99, 4), 11)
_NEW = Sketch("mug", "navy", "starry", "playful", (99, 2), 12)
_NEW_TITLE = "Night Sky Mug in navy with stars"


class Tour:
    """The steps of a tour; each asks the gateway and makes one section or more.

    Photographs that calls refer to are written under `pictures`.
    """

    def __init__(self, gateway: Gateway, shop: Shop, pictures: Path) -> None:
        self._gateway, self._shop, self._pictures = gateway, shop, pictures
        pictures.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> tuple[Callable[[], list[Section]], ...]:
        """What is shown, in its order."""
        return self._people, self._stranger, self._texts, self._by_photograph, self._newcomer

    def _people(self) -> list[Section]:
        sections = []
        for user_id in some_buyers(self._shop, PEOPLE, 2 * HISTORY):
            request = pb.RecommendRequest(user_id=user_id, page_size=SHOWN)
            response, took = self._gateway.recommend(request)
            bought = [self._gateway.card(i) for i in bought_by(self._shop, user_id)]
            sections.append(
                Section(
                    f"Recommended for {user_id}",
                    "A person whom the shop knows. Above what they bought last, below their page: "
                    "each item says which sources proposed it.",
                    self._gateway.call("Recommend", request),
                    (
                        Strip("Bought before, latest first", tuple(bought[:HISTORY])),
                        Strip("Recommended", self._gateway.cards(response)),
                    ),
                    (*degraded(response), f"answered in {took:.0f} ms"),
                )
            )
        return sections

    def _stranger(self) -> list[Section]:
        looked_at = a_session(self._shop.items)
        request = pb.RecommendRequest(session=session_of(looked_at), page_size=SHOWN)
        response, took = self._gateway.recommend(request)
        return [
            Section(
                "A stranger, two clicks into a visit",
                "Nobody knows this person. The two items of the running visit are all there is to go by.",
                self._gateway.call("Recommend", request),
                (
                    Strip("Looked at in this visit", tuple(self._gateway.card(i) for i in looked_at)),
                    Strip("Recommended", self._gateway.cards(response)),
                ),
                (*degraded(response), f"answered in {took:.0f} ms"),
            )
        ]

    def _texts(self) -> list[Section]:
        sections = []
        for text in SEARCHES:
            request = pb.SearchItemsRequest(text=text, page_size=SHOWN)
            response, took = self._gateway.search(request)
            sections.append(
                Section(
                    f"Search: {text}",
                    "A search by meaning, in the words of a person.",
                    self._gateway.call("SearchItems", request),
                    (Strip("Found", self._gateway.cards(response)),),
                    (f"answered in {took:.0f} ms",),
                )
            )
        return sections

    def _by_photograph(self) -> list[Section]:
        path = self._picture("yellow-floral-bag", photograph(_QUERY))
        request = pb.SearchItemsRequest(image=path.read_bytes(), page_size=SHOWN)
        return [
            self._image_search(
                request, "Search by photograph", "A picture of a bag that the shop does not have.", path
            )
        ]

    def _newcomer(self) -> list[Section]:
        path = self._picture("night-sky-mug", photograph(_NEW))
        item = item_pb2.Item(
            id=NEW_ID,
            title=_NEW_TITLE,
            description="A playful mug for night owls: little stars all over a dark blue glaze.",
            price=13.9,
        )
        item.image.data = path.read_bytes()
        for name, text in (("type", _NEW.kind), ("colour", _NEW.colour), ("pattern", _NEW.pattern)):
            item.attributes.add(name=name, texts=[text])
        outcome, took = self._gateway.renew(item)
        if outcome.HasField("error"):
            raise RuntimeError(f"{NEW_ID} was not written: {outcome.error.message}")
        upsert = Section(
            "A brand-new item",
            "Written a moment ago. Nobody has seen, clicked or bought it. Its acknowledgement carries a "
            "sequence number, and calls that pass it as min_sequence see the item.",
            self._gateway.call("BatchUpsertItems", pb.BatchUpsertItemsRequest(items=[item]), path),
            (Strip("Written", (self._gateway.card(NEW_ID),)),),
            (f"acknowledged in {took:.0f} ms as change {outcome.sequence}",),
        )
        return [upsert, *self._find_newcomer(path, outcome.sequence)]

    def _find_newcomer(self, path: Path, sequence: int) -> list[Section]:
        by_text = pb.SearchItemsRequest(
            text="dark blue cup with stars", page_size=SHOWN, min_sequence=sequence
        )
        response, took = self._gateway.search(by_text)
        near = [card.item_id for card in self._gateway.cards(response) if not card.is_the_new_one][:2]
        found = Section(
            "The new item, found by a text",
            "In other words than its own.",
            self._gateway.call("SearchItems", by_text),
            (Strip("Found", self._gateway.cards(response)),),
            (_place(response), f"answered in {took:.0f} ms"),
        )
        by_picture = pb.SearchItemsRequest(
            image=photograph(Sketch(_NEW.kind, _NEW.colour, _NEW.pattern, _NEW.style, _NEW.form, 13)),
            page_size=SHOWN,
            min_sequence=sequence,
        )
        another = self._picture("night-sky-mug-again", by_picture.image)
        seen = self._image_search(
            by_picture, "The new item, found by a photograph", "Another photograph of it.", another
        )
        request = pb.RecommendRequest(session=session_of(near), page_size=SHOWN, min_sequence=sequence)
        answer, took = self._gateway.recommend(request)
        recommended = Section(
            "The new item, recommended",
            "To a stranger who looked at two items near it.",
            self._gateway.call("Recommend", request),
            (
                Strip("Looked at in this visit", tuple(self._gateway.card(i) for i in near)),
                Strip("Recommended", self._gateway.cards(answer)),
            ),
            (*degraded(answer), self._place_further_down(request), f"answered in {took:.0f} ms"),
        )
        return [found, seen, recommended]

    def _image_search(self, request: pb.SearchItemsRequest, title: str, prose: str, path: Path) -> Section:
        call = self._gateway.call("SearchItems", request, path)
        asked = Strip("Asked with", (page.picture_card(path),))
        try:
            response, took = self._gateway.search(request)
        except grpc.RpcError as error:
            # A bundle without an image encoder is whole; the tour goes on and says what it lacks.
            remark = f"{error.code().name}: {error.details()}"
            return Section(title, prose, call, (asked,), (remark,))
        place = (_place(response),) if request.min_sequence else ()
        remarks = (*place, f"answered in {took:.0f} ms")
        return Section(title, prose, call, (asked, Strip("Found", self._gateway.cards(response))), remarks)

    def _place_further_down(self, request: pb.RecommendRequest) -> str:
        longer = pb.RecommendRequest()
        longer.CopyFrom(request)
        longer.page_size = MOST
        return _place(self._gateway.recommend(longer)[0])

    def _picture(self, name: str, content: bytes) -> Path:
        path = self._pictures / f"{name}.jpg"
        path.write_bytes(content)
        return path


def _place(response: pb.RecommendResponse | pb.SearchItemsResponse) -> str:
    ids = [item.item_id for item in response.items]
    if NEW_ID not in ids:
        return f"the new item is not among the first {len(ids)}"
    return f"the new item is at place {ids.index(NEW_ID) + 1}"


def run(address: str, data: Path, out: Path, console: Console) -> Path:
    """Take the tour; the path of the HTML page, which lies in `out` with the pictures that it asks with.

    Raises:
        grpc.RpcError: the gateway does not answer.
    """
    shop = read_shop(data)
    gateway = Gateway(address, shop.items, shop.photographs)
    sections: list[Section] = []
    try:
        for step in Tour(gateway, shop, out / "pictures").steps:
            for section in step():
                terminal.show(section, console)
                sections.append(section)
    finally:
        gateway.close()
    path = out / "tour.html"
    path.write_text(page.render(sections, address), encoding="utf-8")
    return path


def say_how_to_go_on(address: str, path: Path, console: Console) -> None:
    """Print calls to make by hand, and where the page lies."""
    asks: tuple[tuple[str, object], ...] = (
        ("SearchItems", {"text": "warm winter boots", "page_size": 5}),
        ("SimilarItems", {"item_id": NEW_ID, "page_size": 5}),
        ("DeleteItems", {"item_ids": [NEW_ID]}),
    )
    lines = [f"grpcurl -plaintext {address} {verb}" for verb in ("list", f"describe {SERVICE}")]
    lines += [f"grpcurl -plaintext -d '{json.dumps(body)}' {address} {SERVICE}/{what}" for what, body in asks]
    console.rule("[bold]Go on with grpcurl")
    for line in (*lines, "", f"The page: {path.resolve()}"):
        console.print(line, markup=False, soft_wrap=True, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Take the tour that the command line describes."""
    parser = argparse.ArgumentParser(prog="python -m demo.tour", description="A tour of a running Vitrine.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="the gateway's host:port")
    parser.add_argument("--data", type=Path, required=True, help="the shop directory it was trained on")
    parser.add_argument("--out", type=Path, default=Path("build/demo/tour"), help="where the page goes")
    options = parser.parse_args(arguments)
    console = Console()
    path = run(options.address, options.data, options.out, console)
    say_how_to_go_on(options.address, path, console)


if __name__ == "__main__":
    main()
