"""Dialogues with the small shop, and lamps to talk about."""

from typing import Any

from vitrine.catalog.v1 import item_pb2
from vitrine.gateway.v1 import recommendation_service_pb2 as pb

from tests.support.shop_server import Stub


class Talk:
    """A dialogue of a person with a shop; every turn goes on from the one before."""

    def __init__(self, stub: Stub, **user: str) -> None:
        self.stub, self.user, self.token = stub, user, ""

    async def say(self, message: str = "", **more: Any) -> Any:
        request = pb.ConverseRequest(
            message=message, conversation_token=self.token, **({"page_size": 10} | self.user | more)
        )
        answer = await self.stub.Converse(request)
        self.token = answer.conversation_token
        return answer


async def stock(stub: Stub) -> None:
    """Six lamps of two brands, described alike two by two, in addition to the items of the bundle."""
    items = []
    for n, (brand, colour, title) in enumerate(
        [
            ("Nordlicht", "green", "wool winter lamp"),
            ("Nordlicht", "green", "wool winter lamp"),
            ("Nordlicht", "红色", "steel summer lamp"),
            ("Sol y Sombra", "green", "steel summer lamp"),
            ("Sol y Sombra", "红色", "glass evening lamp"),
            ("Sol y Sombra", "green", "glass evening lamp"),
        ]
    ):
        texts_by_name = {"brand_name": brand, "colour": colour, "world": "lamps"}
        texts = [item_pb2.Attribute(name=name, texts=[text]) for name, text in texts_by_name.items()]
        items.append(item_pb2.Item(id=f"lamp-{n:02}", title=title, price=10.0 * (n + 1), attributes=texts))
    response = await stub.BatchUpsertItems(pb.BatchUpsertItemsRequest(items=items))
    assert all(outcome.sequence for outcome in response.outcomes)
    await stub.Recommend(pb.RecommendRequest(min_sequence=response.outcomes[-1].sequence))


LAMPS = {f"lamp-{n:02}" for n in range(6)}
