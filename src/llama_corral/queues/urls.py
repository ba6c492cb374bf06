"""URLs of brokers: taken apart, without what is secret, and with it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from ..exceptions import SetupError

_SECRET_OPTIONS: Final = ("password", "passwd", "sslpassword", "token", "secret", "key")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        for host in hosts_of(parts):  # what cannot be read shall be found here
            _ = urlsplit(f"//{host}").port
        if parts.netloc and "@" not in parts.netloc and "@" in f"{parts.path}?{parts.query}#{parts.fragment}":
            raise ValueError  # of a password with one of /?# in it, the beginning would be taken for a port
    except ValueError:
        # Without the text of the error, which holds parts of the URL.
        raise SetupError(
            "The queue URL cannot be read",
            hint="Write scheme://user:password@host:port, with special characters in user and password as %XX.",
        ) from None
    return parts


def hosts_of(parts: SplitResult) -> list[str]:
    """Each `host:port` of a URL, without credentials: of a cluster, several can be named, with commas between them."""
    return parts.netloc.rpartition("@")[2].split(",")


def _join(parts: SplitResult, netloc: str, query: str) -> str:
    # urlunsplit leaves the slashes of an empty host out, where it does not know the scheme: unix:///path.
    scheme = f"{parts.scheme}://" if parts.scheme else ""
    return f"{scheme}{netloc}{parts.path}" + (f"?{query}" if query else "")


def credentials_of(url: str) -> tuple[str | None, str | None]:
    """User and password of a URL, unquoted. Empty is none: `redis://:password@host` has no user."""
    parts = _split(url)
    return unquote(parts.username or "") or None, unquote(parts.password or "") or None


def without_credentials(url: str) -> str:
    """The same without user, password and options that name something secret: what may be shown and handed on.

    Raises:
        SetupError: it cannot be read. The text never repeats the URL.
    """
    parts = _split(url)
    options = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if name.lower() not in _SECRET_OPTIONS
    ]
    netloc = parts.netloc.rpartition("@")[2]
    return _join(parts, netloc, urlencode(options))


def with_credentials(url: str, user: str | None, password: str | None) -> str:
    """The same with this user and password, in place of what it had. Both None: unchanged."""
    if user is None and password is None:
        return url
    parts = _split(url)
    word = "" if password is None else f":{quote(password, safe='')}"
    netloc = f"{quote(user or '', safe='')}{word}@{parts.netloc.rpartition('@')[2]}"
    return _join(parts, netloc, parts.query)


def take_options(url: str, known: Mapping[str, Callable[[str], Any]]) -> tuple[str, dict[str, Any]]:
    """A URL without the options that are ours, and these as keyword arguments: `?lease=5` for `{"lease": float}`. What is
    not known stays in the URL, for the client of the broker.

    Raises:
        SetupError: an option has a value that cannot be read.
    """
    parts = _split(url)
    options: dict[str, Any] = {}
    rest: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            rest.append((name, value))
            continue
        try:
            options[name] = known[name](value)
        except ValueError:
            raise SetupError(f"The option {name!r} of the queue URL cannot be read") from None
    return _join(parts, parts.netloc, urlencode(rest)), options
