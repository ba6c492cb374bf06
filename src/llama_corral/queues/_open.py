"""From a URL to a queue."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from pydantic import SecretStr

from ..abc import MessageQueue
from ..exceptions import BadInput, SetupError
from ..protocol.topics import DEFAULT_NAMESPACE
from .memory import MemoryMessageQueue


def _memory(url: str, _token: SecretStr | None, _namespace: str) -> MessageQueue:
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


def _http(url: str, token: SecretStr | None, _namespace: str) -> MessageQueue:
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


def _broker(module: str, name: str, extra: str) -> Callable[[str, SecretStr | None, str], MessageQueue]:
    """The adapter of a broker, whose client comes with an extra of the distribution."""

    def make(url: str, _token: SecretStr | None, namespace: str) -> MessageQueue:
        try:
            adapter = getattr(import_module(f"{__package__}.{module}"), name)
        except ModuleNotFoundError as error:
            raise SetupError(
                f"Queues of {extra} need the package {error.name}",
                hint=f"Install it: pip install 'llama-corral[{extra}]'.",
            ) from error
        queue: MessageQueue = adapter.from_url(url, namespace=namespace)
        return queue

    return make


_REDIS: Final = _broker("redis", "RedisMessageQueue", "redis")
_NATS: Final = _broker("nats", "NatsMessageQueue", "nats")
_RABBITMQ: Final = _broker("rabbitmq", "RabbitMQMessageQueue", "rabbitmq")

SCHEMES: Final[dict[str, Callable[[str, SecretStr | None, str], MessageQueue]]] = {
    "memory": _memory,
    "http": _http,
    "https": _http,
    "redis": _REDIS,
    "rediss": _REDIS,
    "unix": _REDIS,
    "nats": _NATS,
    "tls": _NATS,
    "amqp": _RABBITMQ,
    "amqps": _RABBITMQ,
}
"""What `open_queue` understands. A function imports its adapter when it is called: adapters may need an extra."""


def open_queue(url: str, *, token: SecretStr | None = None, namespace: str = DEFAULT_NAMESPACE) -> MessageQueue:
    """The queue that a URL names, not yet entered: `async with open_queue("memory://") as queue: ...`.

    Args:
        token: Bearer token of a queue over HTTP; others do not use it.
        namespace: The topic namespace; messages that cannot be read go to its dead letters.

    Raises:
        SetupError: the scheme is not supported, an option is wrong, or an extra is not installed. The text never repeats
            the URL, which may hold a password.
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
    return make(url, token, namespace)
