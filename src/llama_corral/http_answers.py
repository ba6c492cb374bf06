"""From what a server answers, or does not, to the error families of `llama_corral.exceptions`.

No HTTP library is imported here. No message and no field ever holds the token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from . import exceptions as exc

_NOTHING_DONE: Final = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)

_BY_STATUS: Final[dict[int, type[exc.CorralError]]] = {
    400: exc.UsageError,
    401: exc.Unauthorized,
    403: exc.Unauthorized,
    404: exc.NotFound,
    408: exc.TooSlow,
    409: exc.Conflict,
    413: exc.TooLarge,
    415: exc.BadInput,
    422: exc.BadInput,
    429: exc.TooManyTasks,
    502: exc.Unavailable,
    503: exc.Unavailable,
    504: exc.Unavailable,
}


def _family(base: type[exc.CorralError]) -> Iterator[type[exc.CorralError]]:
    for kind in base.__subclasses__():
        if kind.__module__ == exc.__name__:
            yield kind
            yield from _family(kind)


_BY_CODE: Final = {kind.code: kind for kind in _family(exc.CorralError)}


def no_answer(url: str, reason: str, *, sent: bool) -> exc.Unavailable:
    """Nothing came back. `sent` (a field): the request may have arrived, and what it asks for may have been done."""
    return exc.Unavailable(
        f"no answer from {url}: {reason or 'the connection failed'}",
        hint="Check that the server runs and that the URL is right.",
        url=url,
        sent=sent,
    )


def from_answer(status: int, body: bytes, headers: Mapping[str, str], url: str) -> exc.CorralError:
    """The error that an answer with a status of 300 or above means.

    Fields: `status`, `code`, `url`, `request_id` (under which the server's log has it), `sent` (False if the server says
    that nothing was done) and, where the server said when to come back, `retry_after` in seconds.
    """
    shape = _shape(body)
    fields: dict[str, Any] = {"status": status, "url": url, "request_id": headers.get("x-request-id")}
    if shape is None:
        return _foreign(status, fields)
    code = str(shape.get("code", ""))
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or _fallback(status)
    fields |= {"code": code, "sent": not (status in _NOTHING_DONE and issubclass(kind, exc.Unavailable))}
    if (seconds := _seconds(headers.get("retry-after"))) is not None:
        fields["retry_after"] = seconds
    hint = shape.get("hint")
    return kind(str(shape.get("message") or f"HTTP {status}"), hint=hint if isinstance(hint, str) else None, **fields)


def from_shape(shape: Mapping[str, Any], url: str) -> exc.CorralError:
    """The error in a stream's `error` frame."""
    return from_answer(0, json.dumps({"error": dict(shape)}).encode(), {}, url)


def _foreign(status: int, fields: dict[str, Any]) -> exc.CorralError:
    """An answer that no server of ours gives: a proxy's, or another program's."""
    kind = _BY_STATUS.get(status) or _fallback(status)
    name = HTTPStatus(status).phrase if status in set(HTTPStatus) else "unknown status"
    message = f"{fields['url']} answered {status} ({name}) and no error of ours"
    return kind(message, hint="Check that the URL is the one of a control plane.", **fields, code=None, sent=True)


def not_ours(url: str, reason: str) -> exc.CorralError:
    """A good status with a body that is none of ours."""
    return exc.CorralError(
        f"{url} does not answer as a control plane: {reason}", hint="Check that the URL is right.", url=url
    )


def _fallback(status: int) -> type[exc.CorralError]:
    return exc.UsageError if 400 <= status < 500 else exc.CorralError


def _shape(body: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(body)
    except ValueError:
        return None
    shape = data.get("error") if isinstance(data, dict) else None
    return shape if isinstance(shape, dict) else None


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isascii() and text.isdigit() else None
