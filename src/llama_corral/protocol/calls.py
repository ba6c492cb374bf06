"""What instances ask of a control plane in another process: the paths, the bodies, and the version they agree on.

The bodies are these records and those of `records.py`, as JSON. Members that a side does not know are ignored and new ones
have defaults, so that both sides can be upgraded one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..exceptions import Incompatible
from .records import PROTOCOL_VERSIONS, Checkpoint, HeldTask, Ticket

REGISTER: Final = "/instances/register"
DEREGISTER: Final = "/instances/deregister"
CLAIM: Final = "/instances/claim"
REPORT: Final = "/instances/report"
RELEASE: Final = "/instances/release"
HEARTBEAT: Final = "/instances/heartbeat"
PULL: Final = "/instances/pull"
QUEUE: Final = "/instances/queue"


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """Where a worker finds the message queue. `url`: without user and password; None: it is served by the control plane
    itself, over HTTP."""

    url: str | None
    namespace: str


@dataclass(frozen=True, slots=True)
class DeregisterCall:
    instance_id: str


@dataclass(frozen=True, slots=True)
class ClaimCall:
    ticket: Ticket
    instance_id: str
    nonce: str


@dataclass(frozen=True, slots=True)
class ReleaseCall:
    task_id: str
    epoch: int
    checkpoint: Checkpoint | None = None
    idle: bool = False
    wake_at: float | None = None


@dataclass(frozen=True, slots=True)
class HeartbeatCall:
    instance_id: str
    held: tuple[HeldTask, ...] = ()


@dataclass(frozen=True, slots=True)
class PullCall:
    task_id: str
    epoch: int
    after: int


def common_version(theirs: Sequence[int], ours: Sequence[int] = PROTOCOL_VERSIONS) -> int:
    """The newest version of the protocol that an instance (`theirs`) and a control plane (`ours`) both speak.

    Raises:
        Incompatible: there is none.
    """
    common = set(theirs) & set(ours)
    if common:
        return max(common)
    if not theirs or max(theirs) < min(ours):
        older, hint = "the instance", "Upgrade llama-corral where the worker runs."
    else:
        older, hint = "the control plane", "Upgrade llama-corral where the control plane runs."
    raise Incompatible(
        f"{older} is too old: instance and control plane have no version of the protocol in common "
        f"({_listed(theirs)} and {_listed(ours)})",
        hint=hint,
    )


def _listed(versions: Sequence[int]) -> str:
    return ", ".join(str(version) for version in sorted(set(versions))[:10]) or "none"
