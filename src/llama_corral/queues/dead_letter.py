"""What nobody can read or handle goes to a topic of its own, for a person to look at; then it is acked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from ..protocol.messages import QueueMessage

DEAD_LETTER_TYPE = "dead_letter"
MAX_RAW_CHARACTERS = 100_000


class Letter(BaseModel):
    """The `data` of a message in the dead-letter topic. `message` is the whole message, which can be published again as
    it is; `raw` the beginning of what could not be parsed. `failures`: how often it was tried."""

    topic: str
    reason: str
    failures: int = 0
    message: dict[str, Any] | None = None
    raw: str | None = None


def why_unreadable(error: ValidationError) -> str:
    """For logs and letters: without the content, which is not for everybody who reads a log."""
    return "; ".join(each["msg"] for each in error.errors(include_url=False, include_input=False))


def dead_letter(
    content: QueueMessage | bytes | str,
    topic: str,
    reason: str,
    *,
    publisher_id: str = "default",
    failures: int = 0,
) -> QueueMessage:
    """The message to publish to `protocol.topics.dead_letter(namespace)`; its `data` is a `Letter`."""
    letter = Letter(topic=topic, reason=reason, failures=failures)
    if isinstance(content, QueueMessage):
        letter.message = content.model_dump(mode="json")
    else:
        text = content.decode(errors="replace") if isinstance(content, bytes) else content
        letter.raw = text[:MAX_RAW_CHARACTERS]
    return QueueMessage(publisher_id=publisher_id, type=DEAD_LETTER_TYPE, data=letter.model_dump(exclude_none=True))
