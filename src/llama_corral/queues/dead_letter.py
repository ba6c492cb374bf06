"""What nobody can read or handle goes to a topic of its own, for a person to look at; then it is acked."""

from __future__ import annotations

from ..protocol.messages import QueueMessage

DEAD_LETTER_TYPE = "dead_letter"
MAX_RAW_CHARACTERS = 100_000


def dead_letter(
    content: QueueMessage | bytes | str,
    topic: str,
    reason: str,
    *,
    publisher_id: str = "default",
    failures: int = 0,
) -> QueueMessage:
    """The message to publish to `protocol.topics.dead_letter(namespace)`.

    `data` holds the `topic` it came from, the `reason`, the number of `failures` and either the whole `message`, which
    can be published again as it is, or as `raw` the beginning of what could not be parsed.
    """
    data: dict[str, object] = {"topic": topic, "reason": reason, "failures": failures}
    if isinstance(content, QueueMessage):
        data["message"] = content.model_dump(mode="json")
    else:
        text = content.decode(errors="replace") if isinstance(content, bytes) else content
        data["raw"] = text[:MAX_RAW_CHARACTERS]
    return QueueMessage(publisher_id=publisher_id, type=DEAD_LETTER_TYPE, data=data)
