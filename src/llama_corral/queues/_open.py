"""From a URL to a queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from pydantic import SecretStr

from ..abc import MessageQueue
from ..exceptions import BadInput, SetupError
from .memory import MemoryMessageQueue


def _memory(url: str, _token: SecretStr | None) -> MessageQueue:
    parts = urlsplit(url)
    if parts.netloc or parts.path.strip("/"):
        raise SetupError("A memory queue has no host and no path", hint="Write memory:// and nothing behind it.")
    options: dict[str, int] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in {"max_messages", "max_topics", "broadcast_buffer"}:
            raise SetupError(
                f"A memory queue has no option {name!r}",
                hint="Its options are max_messages, max_topics and broadcast_buffer.",
            )
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise SetupError(f"Option {name} of a memory queue must be a positive number")
        options[name] = int(value)
    return MemoryMessageQueue(**options)


def _http(url: str, token: SecretStr | None) -> MessageQueue:
    from .http import HttpMessageQueue  # the HTTP client takes a while to import

    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise SetupError("A queue over HTTP has no options", hint="Write http://host:port and nothing behind it.")
    try:
        return HttpMessageQueue(url, token=token)
    except BadInput:
        raise SetupError(
            "The queue URL names no HTTP server", hint="Write http://host:port; the token does not belong into the URL."
        ) from None


SCHEMES: Final[dict[str, Callable[[str, SecretStr | None], MessageQueue]]] = {
    "memory": _memory,
    "http": _http,
    "https": _http,
}
"""What `open_queue` understands. A function imports its adapter when it is called: adapters may need an extra."""


def open_queue(url: str, *, token: SecretStr | None = None) -> MessageQueue:
    """The queue that a URL names, not yet entered: `async with open_queue("memory://") as queue: ...`.

    Args:
        token: Bearer token of a queue over HTTP; others do not use it.

    Raises:
        SetupError: the scheme is not supported, or an option is wrong. The text never repeats the URL, which may hold a
            password.
    """
    scheme, separator, _ = url.partition("://")
    make = SCHEMES.get(scheme.lower()) if separator else None
    if make is None:
        named = f"the scheme {scheme!r}" if separator else "no scheme"
        raise SetupError(
            f"The queue URL has {named}, which is not supported",
            hint="Supported: " + ", ".join(f"{known}://" for known in sorted(SCHEMES)) + ".",
            supported=sorted(SCHEMES),
        )
    return make(url, token)
