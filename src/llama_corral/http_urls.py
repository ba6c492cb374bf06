"""URLs, paths and the header of a token. No HTTP library is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

from .exceptions import BadInput


def check_url(url: str) -> str:
    """The URL of a control plane without a slash at its end.

    Raises:
        BadInput: it is no http or https URL with a host, or it has a user and a password in it.
    """
    hint = "Give one like http://127.0.0.1:8000."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadInput(f"not a URL of a control plane: {error}", hint=hint) from error
    if "@" in parts.netloc:
        # It would come back in messages and logs.
        raise BadInput("the URL holds a user or a password", hint="Give the token beside the URL.")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise BadInput(f"not a URL of a control plane: {url!r}", hint=hint)
    return urlunsplit(SplitResult(parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def check_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """The URLs of one control plane, or of several on one store: a sequence, or a text with commas in between.

    Raises:
        BadInput: as `check_url`, or there is none.
    """
    given = urls.split(",") if isinstance(urls, str) else urls
    found = tuple(dict.fromkeys(check_url(url.strip()) for url in given if url.strip()))
    return found or (check_url(""),)  # which says what is wrong


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def authorization(token: str) -> bytes:
    """The value of the header that carries a token.

    Raises:
        BadInput: no header can carry it.
    """
    token = token.strip()
    if not token.isprintable():
        raise BadInput("the token holds a character that no header can carry", hint="Give it without line breaks.")
    return f"Bearer {token}".encode()


def path_of(*parts: str) -> str:
    """A path of parts that may hold any character."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)
