"""The one place that knows HTTP statuses: from our error families, and from routing, to one error shape.

    {"error": {"code": "not_found", "message": "...", "hint": "..." or null}, "detail": "<message>"}

`detail` repeats the message for clients of the original llama_deploy. An error that is not ours answers 500 with a
generic text; its traceback is logged with the request id.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus

import trio
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from .. import exceptions as exc
from ..log_ids import REQUEST_ID

logger = logging.getLogger(__name__)


class Malformed(exc.BadInput):
    """The request cannot be read at all: no JSON, no UTF-8, a broken query string."""

    code = "malformed"


class UnsupportedType(exc.BadInput):
    """The body is announced as something else than JSON."""

    code = "unsupported_media_type"


class ForeignOrigin(exc.UsageError):
    """A page of another site sent this request through the user's browser."""

    code = "foreign_origin"


class ErrorDetail(BaseModel):
    code: str
    message: str
    hint: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or above."""

    error: ErrorDetail
    detail: str


_STATUSES: dict[type[BaseException], int] = {
    exc.UsageError: 400,
    Malformed: 400,
    UnsupportedType: 415,
    ForeignOrigin: 403,
    exc.BadInput: 422,
    exc.NotFound: 404,
    exc.Conflict: 409,
    exc.TooLarge: 413,
    exc.TooSlow: 408,
    exc.Unauthorized: 401,
    exc.Unavailable: 503,
    exc.TooManyTasks: 429,
    exc.TaskTimedOut: 504,
    exc.TaskCancelled: 409,
    exc.TaskEnded: 500,
    exc.Fenced: 409,
    exc.MailboxFull: 503,
}
"""The most derived class in an error's MRO decides. Families that are not listed answer 500."""

_RETRY_AFTER = "1"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as it is answered."""

    status: int
    code: str
    message: str
    hint: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        detail = {"code": self.code, "message": self.message, "hint": self.hint}
        return to_json({"error": detail, "detail": self.message})


def refusal(error: BaseException) -> Refusal:
    """How `error` is answered. An unexpected one is logged here, and says nothing about itself to the client."""
    if isinstance(error, HTTPException):
        return _from_routing(error)
    for kind in type(error).__mro__:
        if kind in _STATUSES and isinstance(error, exc.CorralError):
            status = _STATUSES[kind]
            return Refusal(status, error.code, error.message, error.hint, _headers_for(status, error))
    logger.error("request %s: unexpected error in a handler", REQUEST_ID.get(), exc_info=error)
    return Refusal(
        500, "internal", "internal server error", "the server's log has the traceback under this answer's X-Request-ID"
    )


def refusal_of_group(group: BaseExceptionGroup[BaseException]) -> Refusal | None:
    """As `refusal` for a handler that owned a nursery; None if nothing but a cancellation is in the group.

    One of our errors is answered only if there is nothing unexpected beside it.
    """
    _, rest = group.split(trio.Cancelled)
    if rest is None:
        return None
    leaves = list(_leaves(rest))
    for leaf in leaves:
        if not isinstance(leaf, Exception):
            raise leaf  # KeyboardInterrupt and its like belong to the program, not to this request
    for leaf in leaves:
        if not isinstance(leaf, (exc.CorralError, HTTPException)):
            return refusal(rest)
    return refusal(leaves[0])


def invalid(error: ValidationError, where: str) -> exc.BadInput:
    """A pydantic error as one of ours. It names fields and rules, never the values, which may be secret or huge."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return Malformed(f"{where}: {details[0]['msg']}", hint="send a JSON document in UTF-8")
    texts = [f"{'.'.join([where, *map(str, item['loc'])])}: {item['msg']}" for item in details[:3]]
    if len(details) > 3:
        texts.append(f"and {len(details) - 3} more")
    return exc.BadInput("; ".join(texts), hint="GET /openapi.json (or /docs) describes what this route takes")


def _headers_for(status: int, error: exc.CorralError) -> dict[str, str]:
    if status == HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": "Bearer"}
    if status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
        return {"Retry-After": str(error.fields.get("retry_after", _RETRY_AFTER))}
    if status in (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT):
        return {"Connection": "close"}  # the rest of the body is unread, so the connection cannot be used again
    return {}


def _from_routing(error: HTTPException) -> Refusal:
    status = error.code or 500
    name = HTTPStatus(status).phrase
    headers: dict[str, str] = {}
    hint = None
    message = error.description or name
    if status == HTTPStatus.NOT_FOUND:
        message, hint = "no such route", "GET /openapi.json (or /docs) lists the routes"
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(error.valid_methods or ()))
        message, hint = "this route has no such method", f"it takes {allowed}"
        headers["Allow"] = allowed
    return Refusal(status, name.lower().replace(" ", "_"), message, hint, headers)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for item in group.exceptions:
        if isinstance(item, BaseExceptionGroup):
            yield from _leaves(item)
        else:
            yield item
