"""Ids of tasks whose start may be repeated: chosen by the client, or following from its `Idempotency-Key`."""

from __future__ import annotations

from typing import Any, Final

from ...exceptions import BadInput
from ...protocol.messages import MAX_KEY, id_of_key, new_id
from ...web import Request

KEY_HEADER: Final[dict[str, Any]] = {"Idempotency-Key": {"type": "string", "minLength": 1, "maxLength": MAX_KEY}}
"""What the OpenAPI document says of the header."""


def task_id_of(request: Request, service_name: str, task_id: str | None) -> tuple[str, bool]:
    """The id of the task, and whether the client may name it again.

    Args:
        task_id: What the client has chosen; None: nothing.

    Raises:
        BadInput: both an id and a key are given; the key is empty or too long.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return task_id or new_id(), task_id is not None
    if task_id is not None:
        raise BadInput("Both an Idempotency-Key and a task_id are given.", hint="One of them is enough.")
    if not 0 < len(key) <= MAX_KEY:
        raise BadInput(f"The Idempotency-Key must have 1 to {MAX_KEY} characters.")
    return id_of_key(service_name, key), True
