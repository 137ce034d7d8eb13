"""`python -m demo.tour`: show what a running Vitrine does, in the terminal and as one HTML page.

Needs the address of a gateway and the shop directory of its bundle. Adds one item to the catalog; a later
tour replaces it.
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
from demo.client import SERVICE, Gateway, Section, Strip, degraded, session_of
from demo.drawing import Sketch, render_jpeg
from demo.examples import purchases_of, sample_buyers, sample_session, similar_items
from training.data.dataset import ShopData, read_shop

USERS = 3
PAGE_SIZE = 12
MAX_PAGE_SIZE = 500
"""The maximum page size of the contract."""
HISTORY = 6
SEARCHES = ("red striped mug", "something elegant and black for an evening out", "a floral bag for the beach")
NEW_ID = "tour-night-sky-mug"
_QUERY = Sketch("handbag", "yellow", "floral", "bohemian", (99, 4), 11)
_NEW = Sketch("mug", "navy", "starry", "playful", (99, 2), 12)
_NEW_ATTRIBUTES = {"type": _NEW.kind, "colour": _NEW.color, "pattern": _NEW.pattern}
_NEW_TITLE = "Night Sky Mug in navy with stars"


class Tour:
    """The steps of a tour; each calls the gateway and returns sections to show.

    The image files of the calls are written to `pictures`.
    """

    def __init__(self, gateway: Gateway, shop: ShopData, pictures: Path) -> None:
        self._gateway, self._shop, self._pictures = gateway, shop, pictures
        pictures.mkdir(parents=True, exist_ok=True)

    @property
    def steps(self) -> tuple[Callable[[], list[Section]], ...]:
        """The steps in their order."""
        return self._known_users, self._anonymous_user, self._texts, self._by_image, self._new_item

    def _known_users(self) -> list[Section]:
        sections = []
        for user_id in sample_buyers(self._shop, USERS, 2 * HISTORY):
            request = pb.RecommendRequest(user_id=user_id, page_size=PAGE_SIZE)
            response, milliseconds = self._gateway.recommend(request)
            purchases = [self._gateway.card(i) for i in purchases_of(self._shop, user_id)]
            sections.append(
                Section(
                    f"Recommended for {user_id}",
                    "A user with a history. The first row has their latest purchases, the second their page: "
                    "each item lists the candidate sources that rank it highest.",
                    self._gateway.call("Recommend", request),
                    (
                        Strip("Bought before, latest first", tuple(purchases[:HISTORY])),
                        Strip("Recommended", self._gateway.cards(response)),
                    ),
                    (*degraded(response), f"answered in {milliseconds:.0f} ms"),
                )
            )
        return sections

    def _anonymous_user(self) -> list[Section]:
        viewed = sample_session(self._shop.items)
        request = pb.RecommendRequest(session=session_of(viewed), page_size=PAGE_SIZE)
        response, milliseconds = self._gateway.recommend(request)
        return [
            Section(
                "An anonymous user after two clicks",
                "The shop has no history of this user. The page depends on the two session items alone.",
                self._gateway.call("Recommend", request),
                (
                    Strip("Viewed in this session", tuple(self._gateway.card(i) for i in viewed)),
                    Strip("Recommended", self._gateway.cards(response)),
                ),
                (*degraded(response), f"answered in {milliseconds:.0f} ms"),
            )
        ]

    def _texts(self) -> list[Section]:
        sections = []
        for text in SEARCHES:
            request = pb.SearchItemsRequest(text=text, page_size=PAGE_SIZE)
            response, milliseconds = self._gateway.search(request)
            sections.append(
                Section(
                    f"Search: {text}",
                    "A search by meaning, in everyday words.",
                    self._gateway.call("SearchItems", request),
                    (Strip("Found", self._gateway.cards(response)),),
                    (f"answered in {milliseconds:.0f} ms",),
                )
            )
        return sections

    def _by_image(self) -> list[Section]:
        path = self._picture("yellow-floral-bag", render_jpeg(_QUERY))
        request = pb.SearchItemsRequest(image=path.read_bytes(), page_size=PAGE_SIZE)
        return [
            self._image_search(
                request, "Search by photograph", "A picture of a bag that the shop does not have.", path
            )
        ]

    def _new_item(self) -> list[Section]:
        path = self._picture("night-sky-mug", render_jpeg(_NEW))
        item = item_pb2.Item(
            id=NEW_ID,
            title=_NEW_TITLE,
            description="A playful mug for night owls: little stars all over a dark blue glaze.",
            price=13.9,
        )
        item.image.data = path.read_bytes()
        for name, text in _NEW_ATTRIBUTES.items():
            item.attributes.add(name=name, texts=[text])
        outcome, milliseconds = self._gateway.renew(item)
        if outcome.HasField("error"):
            raise RuntimeError(f"{NEW_ID} was not written: {outcome.error.message}")
        upsert = Section(
            "A brand-new item",
            "Just written, without any event. The response has a sequence number; calls that pass it as "
            "min_sequence include the item.",
            self._gateway.call("BatchUpsertItems", pb.BatchUpsertItemsRequest(items=[item]), path),
            (Strip("Written", (self._gateway.card(NEW_ID),)),),
            (f"acknowledged in {milliseconds:.0f} ms as change {outcome.sequence}",),
        )
        return [upsert, *self._find_new_item(path, outcome.sequence)]

    def _find_new_item(self, path: Path, sequence: int) -> list[Section]:
        by_text = pb.SearchItemsRequest(
            text="dark blue cup with stars", page_size=PAGE_SIZE, min_sequence=sequence
        )
        response, milliseconds = self._gateway.search(by_text)
        text_section = Section(
            "The new item, found by a text",
            "The query uses other words than the title.",
            self._gateway.call("SearchItems", by_text),
            (Strip("Found", self._gateway.cards(response)),),
            (_rank_remark(response), f"answered in {milliseconds:.0f} ms"),
        )
        by_image = pb.SearchItemsRequest(
            image=render_jpeg(Sketch(_NEW.kind, _NEW.color, _NEW.pattern, _NEW.style, _NEW.form, 13)),
            page_size=PAGE_SIZE,
            min_sequence=sequence,
        )
        another = self._picture("night-sky-mug-again", by_image.image)
        image_section = self._image_search(
            by_image, "The new item, found by a photograph", "Another photograph of it.", another
        )
        similar = similar_items(self._shop.items, _NEW_ATTRIBUTES, 2)
        request = pb.RecommendRequest(session=session_of(similar), page_size=PAGE_SIZE, min_sequence=sequence)
        recommendation, milliseconds = self._gateway.recommend(request)
        recommended = Section(
            "The new item, recommended",
            "To an anonymous user who viewed the two items of the shop that share most of its attributes.",
            self._gateway.call("Recommend", request),
            (
                Strip("Viewed in this session", tuple(self._gateway.card(i) for i in similar)),
                Strip("Recommended", self._gateway.cards(recommendation)),
            ),
            (
                *degraded(recommendation),
                self._rank_in_longest_page(request),
                f"answered in {milliseconds:.0f} ms",
            ),
        )
        return [text_section, image_section, recommended]

    def _image_search(self, request: pb.SearchItemsRequest, title: str, prose: str, path: Path) -> Section:
        call = self._gateway.call("SearchItems", request, path)
        query = Strip("Query image", (page.image_card(path),))
        try:
            response, milliseconds = self._gateway.search(request)
        except grpc.RpcError as error:
            # A bundle may have no image encoder: the tour shows the error and continues.
            remark = f"{error.code().name}: {error.details()}"
            return Section(title, prose, call, (query,), (remark,))
        place = (_rank_remark(response),) if request.min_sequence else ()
        remarks = (*place, f"answered in {milliseconds:.0f} ms")
        return Section(title, prose, call, (query, Strip("Found", self._gateway.cards(response))), remarks)

    def _rank_in_longest_page(self, request: pb.RecommendRequest) -> str:
        longer = pb.RecommendRequest()
        longer.CopyFrom(request)
        longer.page_size = MAX_PAGE_SIZE
        return _rank_remark(self._gateway.recommend(longer)[0])

    def _picture(self, name: str, content: bytes) -> Path:
        path = self._pictures / f"{name}.jpg"
        path.write_bytes(content)
        return path


def _rank_remark(response: pb.RecommendResponse | pb.SearchItemsResponse) -> str:
    ids = [item.item_id for item in response.items]
    if NEW_ID not in ids:
        return f"the new item is not among the first {len(ids)}"
    return f"the new item is at place {ids.index(NEW_ID) + 1}"


def run(address: str, data: Path, out: Path, console: Console) -> Path:
    """Take the tour and return the path of its HTML page in `out`.

    Raises:
        grpc.RpcError: the gateway does not answer.
    """
    shop = read_shop(data)
    gateway = Gateway(address, shop.items, shop.images)
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


def print_next_calls(address: str, path: Path, console: Console) -> None:
    """Print further calls to try, and the path of the page."""
    calls: tuple[tuple[str, object], ...] = (
        ("SearchItems", {"text": "warm winter boots", "page_size": 5}),
        ("SimilarItems", {"item_id": NEW_ID, "page_size": 5}),
        ("DeleteItems", {"item_ids": [NEW_ID]}),
    )
    lines = [f"grpcurl -plaintext {address} {verb}" for verb in ("list", f"describe {SERVICE}")]
    lines += [
        f"grpcurl -plaintext -d '{json.dumps(body)}' {address} {SERVICE}/{method}" for method, body in calls
    ]
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
    print_next_calls(options.address, path, console)


if __name__ == "__main__":
    main()
