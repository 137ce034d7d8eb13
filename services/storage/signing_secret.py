"""The secret that signs tokens: set by the operator, or created in the state directory."""

import os
import secrets
from errno import EDQUOT, ENOSPC
from pathlib import Path
from tempfile import NamedTemporaryFile

from services.core.errors import FailedPrecondition
from services.storage.storage_errors import full_disk

FILE = "secret"
"""Its name in a state directory."""
MIN_BYTES = 32
"""HMAC-SHA256's own length: a shorter key is strongly discouraged (RFC 2104, section 3)."""
_HOW = "create one by `openssl rand -hex 32`"


def signing_secret(secret: str, state: Path) -> bytes:
    """The bytes of `secret`; if it is empty, the secret in the `state` directory, created if it is missing.

    Processes that start at the same time over one state get the same secret.

    Raises:
        FailedPrecondition: the secret is too short, or its file cannot be used.
        StorageFull: the disk has no space for a new one.
    """
    if secret:
        return _long_enough(secret.encode(), "the secret of --secret or VITRINE_SECRET", _HOW)
    path = state / FILE
    try:
        state.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise full_disk(state) from None
        raise FailedPrecondition(
            f"no secret can be stored in {path} ({error}): set one by --secret"
        ) from None
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """The secret in a file, without white space around it.

    Raises:
        FailedPrecondition: it is too short, as an empty file is, or cannot be read.
    """
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise FailedPrecondition(f"the secret in {path} cannot be read: {error}") from None
    advice = "write the secret of the shop's other gateways there, or delete the file to get a new one"
    return _long_enough(content, f"the secret in {path}", advice)


def _long_enough(secret: bytes, name: str, advice: str) -> bytes:
    if len(secret) < MIN_BYTES:
        raise FailedPrecondition(
            f"{name} has {len(secret)} bytes; at least {MIN_BYTES} are needed, "
            f"because a short secret allows forged tokens: {advice}"
        )
    return secret


def _create(path: Path) -> None:
    """Create a secret at `path` atomically; a secret that exists by then stays."""
    with NamedTemporaryFile(dir=path.parent, prefix=f"{FILE}.") as file:  # only its owner may read it
        file.write(secrets.token_hex(MIN_BYTES).encode())
        file.flush()
        os.fsync(file.fileno())
        try:
            os.link(file.name, path)
        except FileExistsError:  # another process was faster
            return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
