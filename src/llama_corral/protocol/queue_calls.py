"""The message queue over HTTP: the paths and bodies of requests and answers.

A client holds leases: one for each consumer and each subscription. A lease ends when it is closed, or when its client was
silent for its duration; what a consumer had open then comes back. `receive` counts its answers with messages in `seq`, so
that an answer that was lost can be asked for again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .messages import QueueMessage

PUBLISH: Final = "/queue/publish"
BROADCAST: Final = "/queue/broadcast"
CONSUME: Final = "/queue/consume"
SUBSCRIBE: Final = "/queue/subscribe"
RECEIVE: Final = "/queue/receive"
SETTLE: Final = "/queue/settle"
CLOSE: Final = "/queue/close"


@dataclass(frozen=True, slots=True)
class PublishCall:
    """Also of a broadcast."""

    topic: str
    message: QueueMessage


@dataclass(frozen=True, slots=True)
class OpenCall:
    """`lease`: seconds of silence after which the lease ends; None leaves it to the server. Subscriptions have no group."""

    topic: str
    group: str = "default"
    lease: float | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """`seconds`: of silence after which it ends."""

    lease_id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ReceiveCall:
    """`seq`: from 1, one more than that of the last answer that had messages. `wait`: seconds to wait for a message."""

    lease_id: str
    seq: int
    max_messages: int = 1
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Received:
    """A message. `number` names the delivery within its lease; a broadcast is not to be settled."""

    number: int
    message: QueueMessage
    redelivered: bool = False


@dataclass(frozen=True, slots=True)
class ReceiveAnswer:
    """`known`: False if there is no such lease (any more). `draining`: the server stops; come back later."""

    messages: tuple[Received, ...] = ()
    known: bool = True
    draining: bool = False


@dataclass(frozen=True, slots=True)
class SettleCall:
    """Deliveries to ack and to give back. `abandoned`: the `seq` of a receive whose answer nobody will take. Without any of
    them it says that the client is there."""

    lease_id: str
    ack: tuple[int, ...] = ()
    nack: tuple[int, ...] = ()
    abandoned: int | None = None


@dataclass(frozen=True, slots=True)
class SettleAnswer:
    known: bool = True


@dataclass(frozen=True, slots=True)
class CloseCall:
    """Each lease with what is to be settled before it ends; what is still open then comes back."""

    leases: tuple[SettleCall, ...]
