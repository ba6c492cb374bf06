"""The seams: MessageQueue, Delivery, Consumer, Coordinator, Store.

The docstrings here are the specification. `llama_corral.testing` holds a contract suite for each seam; an adapter is right
if it passes. All of it is AnyIO: every implementation must work on Trio and on asyncio unless it says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from .protocol.messages import QueueMessage
from .protocol.records import (
    Accepted,
    Checkpoint,
    Claim,
    ClaimRequest,
    DeadLetter,
    DeletedSession,
    EventPage,
    HeartbeatAnswer,
    HeldTask,
    InboxPage,
    InstanceRecord,
    NewTask,
    Reaped,
    Registration,
    Report,
    ReportAnswer,
    SendAnswer,
    ServiceInfo,
    ServiceRecord,
    SessionRecord,
    TaskFilter,
    TaskRecord,
    Ticket,
)


class Delivery(ABC):
    """One message in the hands of one consumer. It is open until `ack` or `nack`, for milliseconds.

    A delivery that is neither acked nor nacked when its consumer goes away (closed, cancelled, killed) comes back to
    another consumer of the group. A second `ack` or `nack` does nothing.
    """

    message: QueueMessage
    redelivered: bool
    """True if the message may have been delivered before. Information: nothing decides by it."""

    @abstractmethod
    async def ack(self) -> None:
        """Tell the queue that the message is taken care of."""

    @abstractmethod
    async def nack(self) -> None:
        """Give the message back: it is delivered again, to any consumer of the group, as soon as one receives."""


class Consumer(ABC):
    """One of the competing consumers of a topic."""

    @abstractmethod
    async def receive(self, max_messages: int = 1) -> list[Delivery]:
        """Wait until there is a message and return 1 to `max_messages` deliveries, oldest first.

        Cancelling the call loses nothing: no message is taken, or it is given back.

        Raises:
            QueueUnavailable: the queue is closed, or away for longer than the adapter is willing to wait.
        """


class Subscription(ABC):
    """A listener of a broadcast topic."""

    @abstractmethod
    async def receive(self) -> QueueMessage:
        """Wait for the next message. A slow listener loses the oldest messages beyond a bounded buffer (wake-ups are
        hints; whoever missed one looks at the state again).

        Raises:
            QueueUnavailable: the queue is closed or the connection was lost; subscribe again, then look at the state.
        """


class MessageQueue(ABC):
    """Carries tickets (a task is ready) and wake-ups (something changed). Nothing whose loss, order or duplication
    matters to the outcome.

    An async context manager that owns its connections and tasks. Closing it never deletes what other processes use.
    """

    durable: bool
    """Whether published messages survive the end of every process of ours. If not, start-up publishes them again."""

    @abstractmethod
    async def __aenter__(self) -> MessageQueue: ...

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None: ...

    @abstractmethod
    async def publish(self, message: QueueMessage, topic: str) -> None:
        """Return once the broker has the message. It waits there for a consumer, whether one exists yet or not.

        Raises:
            QueueUnavailable: the broker did not take it; whether it did is unknown, publish again.
        """

    @abstractmethod
    def consumer(self, topic: str, group: str = "default") -> AbstractAsyncContextManager[Consumer]:
        """A competing consumer: each message of the topic goes to one consumer of each group. The block owns its tasks
        and gives back what is still open when it is left."""

    @abstractmethod
    async def broadcast(self, message: QueueMessage, topic: str) -> None:
        """Hand the message to whoever is subscribed now. No listener is no error."""

    @abstractmethod
    def subscribe(self, topic: str) -> AbstractAsyncContextManager[Subscription]:
        """Listen to broadcasts from the moment on at which the block is entered."""

    @abstractmethod
    def statistics(self) -> Mapping[str, Any]:
        """Numbers to look at: at least `topics`, a mapping of topic to waiting messages where the adapter knows it."""


class Reservation(Protocol):
    """A slot that a service in this process keeps free for a task about to be accepted. Used exactly once."""

    instance_id: str

    def start(self, claim: Claim) -> None:
        """Hand over the claimed task; returns at once."""

    def cancel(self) -> None:
        """Give the slot back."""


class LocalService(Protocol):
    """What a decider in the same process may ask of a service directly, without a message."""

    def reserve(self) -> Reservation | None:
        """A free slot now; None if there is none, if tickets are waiting before this task, or while draining."""

    def check_start(self, arguments: Mapping[str, Any]) -> None:
        """Raise BadInput where the workflow would refuse these start arguments."""

    def check_event(self, payload: str) -> str:
        """The canonical JSON text of an outside event.

        Raises:
            BadInput: it is malformed, or of a type that the workflow does not know.
        """


class Coordinator(ABC):
    """The seam between a service and whoever decides. Calls may be repeated: each answers the same again.

    Raises (all methods):
        Unavailable: the decider is away; the caller retries with backoff, its task stays its own until the lease ends.
    """

    @abstractmethod
    async def register(self, info: ServiceInfo, local: LocalService | None = None) -> Registration:
        """Make the service and this instance of it known. A decider in the same process may use `local` to check input
        at the door and to hand over tasks without a message; others ignore it."""

    @abstractmethod
    async def deregister(self, instance_id: str) -> None:
        """The instance takes nothing more. What it still holds must have been reported or released before."""

    @abstractmethod
    async def claim(self, ticket: Ticket, instance_id: str, nonce: str) -> Claim | None:
        """Take the task of a ticket. None: it is not there to be taken (claimed, ended, deleted); forget the ticket."""

    @abstractmethod
    async def report(self, report: Report) -> ReportAnswer:
        """Store what happened in a run. Returns after it is stored."""

    @abstractmethod
    async def release(
        self,
        task_id: str,
        epoch: int,
        checkpoint: Checkpoint | None,
        *,
        idle: bool = False,
        wake_at: float | None = None,
    ) -> ReportAnswer:
        """Hand a task back (drain): it becomes queued and is ticketed again. A checkpoint of None keeps the stored one.

        Args:
            idle: The run leaves memory until an event comes: the task stays waiting, without an owner, unless something
                has come for it that the checkpoint does not have.
            wake_at: With `idle`: when the run's next timer is due (seconds since the epoch); the task is queued then at
                the latest. None: it has none.
        """

    @abstractmethod
    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        """Say what this instance holds and learn what is fenced, cancelled or has news."""

    @abstractmethod
    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        """Outside events with a seq greater than `after`, and the cancel flag. If `head` is behind the last of them, there
        are more."""


class Store(ABC):
    """The truth. An async context manager; every mutating method is one all-or-nothing unit, answered after its commit.

    Cancelling a caller whose unit still waits withdraws it; once the writer has taken it, the caller waits shielded for
    the commit and is then cancelled. So "cancelled" does not say whether it was applied: repeat with the same ids.

    Raises (all methods):
        StoreUnavailable: closed, or the database failed (disk full, connection lost). The unit was not applied, unless the
            connection was lost in its commit: then field `in_doubt` is True, and repeating it with the same ids is safe.
    """

    exclusive: bool
    """Whether one process has the store for itself while it is open. If not, any number of control planes may use it."""

    @abstractmethod
    async def __aenter__(self) -> Store: ...

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None: ...

    # Services and instances

    @abstractmethod
    async def put_service(self, service: ServiceRecord, instance: InstanceRecord | None = None) -> None:
        """Insert or replace a service, and insert or replace one instance of it."""

    @abstractmethod
    async def delete_service(self, service_name: str) -> bool:
        """Remove a service and its instances; False if there is none. Its tasks stay."""

    @abstractmethod
    async def delete_instance(self, instance_id: str) -> None: ...

    @abstractmethod
    async def get_service(self, service_name: str) -> ServiceRecord | None: ...

    @abstractmethod
    async def list_services(self) -> list[ServiceRecord]:
        """All services, by name."""

    @abstractmethod
    async def list_instances(self) -> list[InstanceRecord]: ...

    @abstractmethod
    async def list_strangers(self) -> list[str]:
        """Owners of open tasks that are not registered: removed too early, or by a claim that came late. Whoever judges
        instances judges them too, or nobody would miss them."""

    @abstractmethod
    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        """Count the instance's heartbeat up and compare what it holds with what is stored."""

    # Sessions

    @abstractmethod
    async def create_session(self, session: SessionRecord) -> bool:
        """False if a session of that id exists; nothing changes then."""

    @abstractmethod
    async def get_session(self, session_id: str) -> SessionRecord | None:
        """With the ids of its tasks in the order of their acceptance."""

    @abstractmethod
    async def list_sessions(self, *, after: str | None = None, limit: int = 100) -> list[SessionRecord]:
        """Explicit sessions in the order of their ids, from the one behind `after` on."""

    @abstractmethod
    async def merge_state(self, session_id: str, changes: Mapping[str, Any]) -> SessionRecord | None:
        """Update the top-level keys of the user state, as dict.update would, and count its version up. None: no such
        session. Merging happens in the transaction: concurrent merges of different keys all stand. The answer names no
        tasks."""

    @abstractmethod
    async def delete_session(self, session_id: str) -> DeletedSession | None:
        """Remove a session with its tasks, events, inbox, checkpoints and contexts. None: no such session."""

    # The life of a task

    @abstractmethod
    async def accept(self, task: NewTask, claim: ClaimRequest | None = None) -> Accepted:
        """Store a task: `held` if an earlier task of its (session, service) is open and the session's policy is
        `enqueue`, else `queued`, or at once `running` if `claim` is given. With a known task id and the same digest, the
        stored acceptance is answered with `created=False`. A chosen id (one with a digest) that was deleted and comes again
        begins behind every epoch it had.

        Raises:
            NotFound: the session does not exist.
            Conflict: the id exists with another digest; or the session is busy and its policy is `reject`.
        """

    @abstractmethod
    async def claim(self, request: ClaimRequest) -> Claim | None:
        """queued -> running, owner set, epoch + 1. None if no row changed, unless the stored claim has the same
        instance and nonce: then the same answer as before."""

    @abstractmethod
    async def report(self, report: Report) -> ReportAnswer:
        """Append events with the next indices, set waiting or running, replace the checkpoint, or end the task: in one
        transaction. Only the stored epoch may write, and only to an open task. The ending deletes the checkpoint, stores
        the context if its version fits, and makes the session's next held task queued.

        A failed ending whose error is retryable queues the task again instead, if its `retry` policy is set, fewer than
        `max_attempts` failures have been counted and it could start before its deadline: attempts + 1, `not_before` set
        by the policy, checkpoint and inbox kept, the error noted.

        If a cancel was requested and the report ends the task otherwise than cancelled, the reported ending stands: the
        first terminal transaction wins."""

    @abstractmethod
    async def release(
        self,
        task_id: str,
        epoch: int,
        checkpoint: Checkpoint | None,
        now: float,
        *,
        idle: bool = False,
        wake_at: float | None = None,
    ) -> ReportAnswer:
        """running or waiting -> queued, owner cleared, checkpoint replaced if one is given. A task whose cancel was
        requested ends as cancelled instead.

        `idle`: the run leaves memory until an event comes. It becomes waiting instead, without an owner, unless the inbox
        holds more than the checkpoint has applied: then it is queued. `wake` queues it when `wake_at` has come."""

    @abstractmethod
    async def request_cancel(self, task_id: str, now: float) -> SendAnswer:
        """A task that an instance owns gets its flag set; any other open task ends as cancelled in this transaction.

        Raises:
            NotFound, Conflict: no such task; it has ended (field `status`).
        """

    @abstractmethod
    async def expire(self, now: float, *, limit: int = 500) -> list[SendAnswer]:
        """End up to `limit` open tasks that nobody owns and whose deadline has passed, as timed_out. Owned ones are their
        owner's. Fewer than `limit`: no others are overdue."""

    @abstractmethod
    async def send(self, task_id: str, payload: str, now: float) -> SendAnswer:
        """Put an outside event into the task's inbox. A waiting task without an owner becomes queued.

        Raises:
            NotFound, Conflict: no such task; it has ended (field `status`).
        """

    @abstractmethod
    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        """The next outside events, some hundreds at most: if `head` is behind the last of them, there are more."""

    @abstractmethod
    async def reap(self, dead_instances: Sequence[str], now: float) -> Reaped:
        """Queue again what these instances own, with attempts + 1; a task whose attempts are used up fails with type
        `worker_lost`, one whose cancel was requested ends as cancelled. Removes the instances. With unknown ids it does
        nothing."""

    @abstractmethod
    async def due_tickets(
        self,
        *,
        limit: int = 1000,
        now: float | None = None,
        since: float | None = None,
        service_name: str | None = None,
    ) -> list[Ticket]:
        """Queued tasks, oldest first: what start-up and the backstop publish (again).

        Args:
            now: Leave out those whose `not_before` lies ahead; a claim of them finds nothing until then.
            since: Beside `now`: only those whose `not_before` came after this moment, first what came first.
            service_name: Beside `now`: only tasks of this service.
        """

    # Replay, timers, upkeep

    @abstractmethod
    async def retry(self, task_id: str, now: float, *, fresh: bool = False) -> Accepted:
        """A new task that does again what an ended task did not complete: same service, session, input and policies, and
        `retry_of`. Its id follows from the old one, so the same call twice is one task. It goes on from the checkpoint
        that was left, if there is one (endings with a retryable error leave it), unless `fresh`. A deadline is not taken
        over.

        Raises:
            NotFound, Conflict: no such task; it is open, or completed (field `status`); its session is gone, or busy with
                the policy `reject`.
        """

    @abstractmethod
    async def wake(self, now: float, *, limit: int = 500) -> list[Ticket]:
        """Queue up to `limit` of the waiting tasks without an owner whose `wake_at` has come, first what came first. Fewer
        than `limit`: there are no others."""

    @abstractmethod
    async def next_due(self, now: float) -> float | None:
        """The next moment at which `expire`, `wake` or a claim of a task with a `not_before` after `now` can do something
        that they can not do now; None if there is none."""

    @abstractmethod
    async def reclaim(self, instance_id: str, strays: Sequence[HeldTask], now: float) -> Reaped:
        """As `reap`, for single tasks that a live instance owns in these epochs and does not hold."""

    @abstractmethod
    async def purge(self, before: float, *, limit: int = 500) -> int:
        """Remove up to `limit` tasks that ended before that time, with all that belongs to them, and dead letters of that
        age; fewer where they have very many events. Answers how many of both went; 0: nothing is left to remove."""

    @abstractmethod
    async def count_queued(self, service_name: str) -> int:
        """Tasks of a service that wait to be claimed: queued and held."""

    @abstractmethod
    async def put_dead_letter(self, letter: DeadLetter) -> None:
        """Keep a message that nobody can use; `letter.no` is given by the store. Of very many, the oldest go."""

    @abstractmethod
    async def list_dead_letters(self, *, before: int | None = None, limit: int = 100) -> list[DeadLetter]:
        """Newest first, from the one before number `before` on."""

    # Reading

    @abstractmethod
    async def get_task(self, task_id: str) -> TaskRecord | None: ...

    @abstractmethod
    async def list_tasks(self, which: TaskFilter) -> list[TaskRecord]: ...

    @abstractmethod
    async def read_events(self, task_id: str, start: int, limit: int = 1000) -> EventPage | None:
        """Events with index >= start, at most `limit`, and the record, read in one transaction. None: no such task."""

    @abstractmethod
    async def count_tasks(self) -> Mapping[str, Mapping[str, int]]:
        """{service name: {status: number}} of the open tasks."""

    @abstractmethod
    async def oldest_queued(self, now: float) -> Mapping[str, float]:
        """{service name: since when the first task in its line could be claimed} of the services that have one: since its
        acceptance, or since its `not_before`. A task that was queued again counts from its acceptance."""

    @abstractmethod
    def statistics(self) -> Mapping[str, Any]:
        """Numbers to look at: units, batches, the largest batch, what waits."""
