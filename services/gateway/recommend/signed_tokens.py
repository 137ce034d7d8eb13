"""Signed, compact, expiring tokens: for attribution, for the next page and for dialogues."""

import base64
import hmac
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from services.core.errors import InvalidArgument

_SIGNATURE_BYTES = 12
LIFETIME = timedelta(days=30)


class SignedTokens:
    """Signs and reads tokens with the `secret` that all gateways of a shop share."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def sign(self, kind: str, content: Mapping[str, Any], now: datetime) -> str:
        """A token of `kind` with JSON content and the time of signing."""
        body = json.dumps({"k": kind, "t": int(now.timestamp()), **content}, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._signature(body) + body).decode().rstrip("=")

    def read(self, kind: str, token: str, now: datetime, field: str) -> dict[str, Any]:
        """The content of a token of `kind`; InvalidArgument names `field` if it is invalid or too old."""
        try:
            data = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except ValueError:
            data = b""
        signature, body = data[:_SIGNATURE_BYTES], data[_SIGNATURE_BYTES:]
        if not body or not hmac.compare_digest(signature, self._signature(body)):
            raise InvalidArgument.of(field, "is not a token of this service")
        content: dict[str, Any] = json.loads(body)
        if content["k"] != kind:
            raise InvalidArgument.of(field, "is a token of another kind")
        if now.timestamp() - content["t"] > LIFETIME.total_seconds():
            raise InvalidArgument.of(field, f"is older than {LIFETIME.days} days")
        return content

    def _signature(self, body: bytes) -> bytes:
        return hmac.digest(self._secret, body, "sha256")[:_SIGNATURE_BYTES]  # `hmac.new` takes twice as long
