"""Names of topics. `{topic_namespace}.{message_type}`, as the original has them; the rest hangs below its own type."""

from __future__ import annotations

from typing import Final

CONTROL_PLANE_NAME: Final = "control_plane"
DEFAULT_NAMESPACE: Final = "llama_deploy"
"""The original's default, so that its services and ours meet on one broker."""


def topic(namespace: str, message_type: str) -> str:
    """The topic that carries messages of one type: tickets of a service (its name) or the control plane's messages."""
    return f"{namespace}.{message_type}"


def instance(namespace: str, instance_id: str) -> str:
    """The broadcast topic on which one running instance hears its wake-ups."""
    return f"{namespace}.instance.{instance_id}"


def dead_letter(namespace: str) -> str:
    """Where a message goes that cannot be read."""
    return f"{namespace}.dead_letter"
