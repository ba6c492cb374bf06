"""What a handler gets and what it may return: `Request`, `Response` (streams are in `streams.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qs

import trio
from pydantic_core import to_json

from ..exceptions import BadInput
from .errors import Malformed, Refusal, refusal

Scope = dict[str, Any]
_INDEX = re.compile(r"[0-9]{1,18}", re.ASCII)


class Request:
    """A request whose body has been read, within the limits, before any handler runs.

    Attributes:
        id: The request id, as logged and as answered in `X-Request-ID`.
        body: The whole body.
        path_params: The parts of the path that the route names.
        drain: Set when the server is asked to stop: end what is open-ended.
    """

    def __init__(self, scope: Scope, request_id: str, drain: trio.Event) -> None:
        self.scope = scope
        self.id = request_id
        self.drain = drain
        self.body = b""
        self.path_params: dict[str, str] = {}
        self.detached = False

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """Headers by lower-case name; the first one where a name is repeated."""
        found: dict[str, str] = {}
        for name, value in self.scope["headers"]:
            found.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        return found

    @cached_property
    def query(self) -> Mapping[str, list[str]]:
        """Query parameters, each with all its values. `Malformed` if the query string cannot be decoded."""
        try:
            text = self.scope["query_string"].decode("ascii")
            return parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=1000)
        except ValueError as error:
            raise Malformed("the query string cannot be read", hint="percent-encode it as UTF-8") from error

    def detach(self) -> None:
        """From here on the handler goes on when the client goes away. It still ends when the server does."""
        self.detached = True


@dataclass(slots=True)
class Response:
    """An answer in full. Handlers return one where a status, a header or another type than JSON is needed."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    @classmethod
    def json(cls, value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """`value` (plain data, pydantic models, dataclasses) as JSON; NaN and infinities become null."""
        return cls(to_json(value, by_alias=True, inf_nan_mode="null"), status, dict(headers or {}))

    @classmethod
    def error(cls, error: BaseException) -> Response:
        """The error shape for one of our exceptions, as if the handler had raised it."""
        return cls.of_refusal(refusal(error))

    @classmethod
    def of_refusal(cls, refused: Refusal) -> Response:
        return cls(refused.body(), refused.status, dict(refused.headers))

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        found = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        if self.status not in (204, 304):
            found.append((b"content-type", self.content_type.encode("latin-1")))
            found.append((b"content-length", b"%d" % len(self.body)))
        return found


def last_event_id(request: Request) -> int | None:
    """The index in `Last-Event-ID`, None without the header. The stream goes on with the index after it.

    Raises:
        BadInput: anything but a non-negative decimal integer. Guessing would replay or skip events.
    """
    text = request.headers.get("last-event-id")
    if text is None:
        return None
    if not _INDEX.fullmatch(text):
        raise BadInput("Last-Event-ID is not an event index", hint="send back the id of the last event you received")
    return int(text)
