"""What a task may ask for besides its start arguments, checked at the door. Pure functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final, TypedDict

from pydantic_core import from_json

from ..exceptions import BadInput
from ..protocol.records import NewTask, RetryPolicy
from .checks import check_number, check_timeout

MAX_ATTEMPTS: Final = 1_000
MAX_NAMES: Final = 100
MAX_NAME: Final = 255
MAX_BACKOFF: Final = 7 * 86_400.0
MAX_FACTOR: Final = 100.0
MAX_DELAY: Final = 366 * 86_400.0


class TaskOptions(TypedDict, total=False):
    """All of it may be left out, or be None.

    timeout: Seconds, counted from the acceptance, after which the task ends as timed out, wherever it is.
    delay, not_before: It does not start before that: seconds from now, or seconds since the epoch. One of the two.
    max_attempts: How often it may be tried. Lost workers count, and errors that `retry` names; progress sets the count
        back. What the control plane is configured for if not given.
    retry: Which errors of the workflow are tried again, and after how long. None: none of them.
    """

    timeout: float | None
    delay: float | None
    not_before: float | None
    max_attempts: int | None
    retry: RetryPolicy | None


def retry_policy(
    errors: Iterable[str],
    *,
    backoff: float | None = None,
    factor: float | None = None,
    max_backoff: float | None = None,
) -> RetryPolicy | None:
    """The policy that these words of a request mean; None if they name no error. `*` among `errors` means any error.

    Raises:
        BadInput: a backoff for no error.
    """
    names = tuple(errors)
    asked = {"backoff": backoff, "factor": factor, "max_backoff": max_backoff}
    given = {name: value for name, value in asked.items() if value is not None}
    if names:
        return RetryPolicy(None if "*" in names else names, **given)
    if given:
        raise BadInput(
            "A backoff is given, but no error after which the task is tried again.",
            hint="Name the errors in retry_on; '*' means any.",
            name="retry_on",
        )
    return None


def new_task(
    options: TaskOptions,
    *,
    task_id: str,
    service_name: str,
    session_id: str | None,
    text: str,
    now: float,
    max_attempts: int,
    repeatable: bool,
) -> NewTask:
    """The task to store.

    Args:
        text: The start arguments as JSON text.
        max_attempts: Of a task that asks for none.
        repeatable: The client may send the request again: it gets a digest.

    Raises:
        BadInput: an option is out of its bounds.
    """
    timeout = check_timeout(options.get("timeout"))
    not_before = _start_time(options, now)
    if timeout is not None and not_before is not None and not_before >= now + timeout:
        raise BadInput("The task would time out before it may start.", hint="Give a longer timeout.", name="timeout")
    attempts = options.get("max_attempts")
    check_number("max_attempts", attempts, 1, MAX_ATTEMPTS)
    return NewTask(
        task_id=task_id,
        service_name=service_name,
        input=text,
        created_at=now,
        session_id=session_id,
        deadline=None if timeout is None else now + timeout,
        not_before=not_before,
        max_attempts=max_attempts if attempts is None else attempts,
        digest=digest(service_name, session_id, text, options) if repeatable else None,
        retry=_check_retry(options.get("retry")),
    )


def digest(service_name: str, session_id: str | None, text: str, options: TaskOptions) -> str:
    """Identifies everything that a request asks for, however it is written."""
    asked: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, RetryPolicy):
            asked[name] = {key: float(item) if isinstance(item, int) else item for key, item in asdict(value).items()}
        elif value is not None:
            asked[name] = float(value)  # type: ignore[arg-type]  # the others are numbers
    content = json.dumps([service_name, session_id, from_json(text), asked], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _start_time(options: TaskOptions, now: float) -> float | None:
    delay, not_before = options.get("delay"), options.get("not_before")
    if delay is not None and not_before is not None:
        raise BadInput("Both delay and not_before are given.", hint="One of them is enough.", name="not_before")
    check_number("delay", delay, 0, MAX_DELAY)
    check_number("not_before", not_before, 0, now + MAX_DELAY)
    if delay is not None:
        not_before = now + delay
    return None if not_before is None or not_before <= now else not_before


def _check_retry(retry: RetryPolicy | None) -> RetryPolicy | None:
    if retry is None:
        return None
    for name in retry.errors or ():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise BadInput(f"retry_on names no class of errors: {name[:40]!r}", name="retry_on")
    if retry.errors is not None and not 0 < len(retry.errors) <= MAX_NAMES:
        raise BadInput(f"retry_on takes 1 to {MAX_NAMES} names.", hint="'*' means any error.", name="retry_on")
    check_number("backoff", retry.backoff, 0, MAX_BACKOFF)
    check_number("backoff_factor", retry.factor, 1, MAX_FACTOR)
    check_number("max_backoff", retry.max_backoff, 0, MAX_BACKOFF)
    return retry
