"""Seals of stored state: an HMAC-SHA256 over what it is and where it belongs, so that a changed or moved one is noticed."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import final

from ..exceptions import SetupError

Part = str | int | None


@final
class Sealer:
    """Seals with the first secret and accepts seals of any, so that a secret can be replaced while states live.

    Args:
        secrets: Texts or bytes, the newest first.

    Raises:
        SetupError: there is no secret, or one of them is empty.
    """

    __slots__ = ("_keys",)

    def __init__(self, secrets: Sequence[str | bytes]) -> None:
        if isinstance(secrets, (str, bytes)):
            secrets = [secrets]
        keys = tuple(secret.encode() if isinstance(secret, str) else bytes(secret) for secret in secrets)
        if not keys or not all(keys):
            raise SetupError("A sealer needs a secret that is not empty.", hint="Set a long random secret, or none.")
        self._keys = keys

    def seal(self, *parts: Part) -> str:
        """The seal of these parts in this order."""
        return hmac.digest(self._keys[0], _encoded(parts), hashlib.sha256).hex()

    def verifies(self, seal: str | None, *parts: Part) -> bool:
        """Whether one of the secrets made this seal of these parts. None, no seal, never fits."""
        if not isinstance(seal, str):
            return False
        given = seal.encode("utf-8", "surrogatepass")
        content = _encoded(parts)
        # All are tried, whichever fits: the time says nothing about the secrets.
        fits = [
            hmac.compare_digest(hmac.digest(key, content, hashlib.sha256).hex().encode("ascii"), given)
            for key in self._keys
        ]
        return any(fits)

    def __repr__(self) -> str:
        return "Sealer(...)"

    def __reduce__(self) -> str:
        raise TypeError("A sealer holds secrets and is not copied out of its process.")


def _encoded(parts: Sequence[object]) -> bytes:
    """Each part with its kind and its length before it: no two sequences of parts have the same bytes."""
    pieces: list[bytes] = []
    for part in parts:
        if part is None:
            kind, content = b"n", b""
        elif isinstance(part, int):
            kind, content = b"i", str(part).encode("ascii")
        elif isinstance(part, str):
            kind, content = b"s", part.encode("utf-8", "surrogatepass")
        else:  # a database that was tampered with can hold anything anywhere; no seal is made of such a part
            kind, content = b"?", repr(part).encode("utf-8", "backslashreplace")
        pieces += (kind, len(content).to_bytes(8, "big"), content)
    return b"".join(pieces)
