"""Where a service's work comes from: tickets of a queue, tickets handed in, reservations of a decider in this process.

All of them meet at the limiter. Whoever waits there is served in turn, so that neither new tasks nor runs that go on
after they waited starve each other.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import anyio
import anyio.abc

from ..abc import Consumer, Coordinator, Delivery, MessageQueue
from ..exceptions import NotFound, QueueUnavailable, Unavailable, UsageError
from ..protocol import topics
from ..protocol.messages import ActionTypes, QueueMessage, TaskDefinition, new_id
from ..protocol.records import Claim, Ticket
from ..queues.dead_letter import dead_letter
from ..runtime import Slot
from ..supervision import Backoff, restart

logger = logging.getLogger(__name__)

READY_LIMIT = 10_000
"""Tickets that wait inside the service (bare queue, POST /process_message); beyond it whoever brings one waits."""
TAKE_AT_ONCE = 64
"""Tickets taken from the queue in one call."""
CLAIM_ATTEMPTS = 5
"""How often a claim is asked for before its ticket goes back to the queue."""
UNANSWERED_CLAIMS = 1_000
"""Claims without an answer whose nonce is remembered."""


class IntakeHost(Protocol):
    """What the intake needs of its service."""

    instance_id: str

    @property
    def publisher_id(self) -> str: ...

    @property
    def service_name(self) -> str: ...

    @property
    def topic_namespace(self) -> str: ...

    @property
    def coordinator(self) -> Coordinator: ...

    @property
    def message_queue(self) -> MessageQueue: ...

    def start_run(self, fn: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a task among the service's runs."""

    async def execute(self, claim: Claim, slot: Slot) -> None:
        """Work on a claimed task to its ending."""


async def keep_consuming(
    what: str,
    consume: Callable[[Callable[[], None]], Awaitable[None]],
    *,
    task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Run `consume` again, with backoff, whenever the queue was lost. It calls its argument when it has opened what it
    consumes; a queue that is away before that happened once is the caller's to know."""
    opened = False

    def on_open() -> None:
        nonlocal opened
        if not opened:
            opened = True
            task_status.started()

    try:
        await consume(on_open)
    except QueueUnavailable as exc:
        if not opened:
            raise
        logger.warning("%s lost the queue: %s", what, exc)
    await restart(partial(consume, on_open), retry_on=QueueUnavailable, what=what)


class Intake:
    """Takes tickets while a slot is free and starts the runs of their tasks.

    Args:
        limiter: The service's cap.
    """

    def __init__(self, host: IntakeHost, limiter: anyio.CapacityLimiter) -> None:
        self._host = host
        self._limiter = limiter
        self._backoff = Backoff()
        self._ready_in, self._ready_out = anyio.create_memory_object_stream[Ticket](READY_LIMIT)
        # By task: a claim whose answer never came may be stored; asked with the same nonce it is answered again.
        self._unanswered: OrderedDict[str, str] = OrderedDict()
        self._parked = False
        self._owes = False
        self._reserved = 0
        self._none_reserved = anyio.Event()
        self._in_hand: list[Ticket] = []

    @property
    def instance_id(self) -> str:
        return self._host.instance_id

    @property
    def ready(self) -> int:
        """Tickets that wait inside the service."""
        return self._ready_out.statistics().current_buffer_used + len(self._in_hand)

    # Tickets of the queue

    async def take_tickets(self, consumer: Consumer) -> None:
        """Take tickets when a slot is free, without holding the slot while waiting for one."""
        while True:
            await self._wait_slot_free()
            free = min(self._limiter.available_tokens, TAKE_AT_ONCE)
            self._parked = True
            try:
                deliveries = await consumer.receive(max(1, int(free)))
            finally:
                self._parked = False
            given_back: list[Delivery] = []
            for delivery in deliveries:
                slot = Slot(self._limiter)
                if slot.take_nowait():
                    self._owes = False
                    self._host.start_run(self._take, delivery, slot)
                else:
                    given_back.append(delivery)
            for delivery in reversed(given_back):  # each goes back to the front
                self._owes = True
                await _nack(delivery)

    async def _wait_slot_free(self) -> None:
        """Return when a slot is free, in turn with runs that wait to go on, and leave it free."""
        turn = Slot(self._limiter)
        await turn.ensure()
        turn.release()

    async def _take(self, delivery: Delivery, slot: Slot) -> None:
        """Claim the task of a ticket, acknowledge it, and work on the task."""
        try:
            ticket = self._ticket(delivery.message)
            if ticket is None:
                await self.bury(delivery, "no ticket of this service")
                return
            try:
                claim = await self._claim(ticket)
            except Unavailable as exc:
                logger.warning("the ticket of task %s goes back to the queue: %s", ticket.task_id, exc)
                await _nack(delivery)
                return
            except UsageError as exc:  # given back it would come again at once; its task stays queued
                logger.error("task %s cannot be claimed: %s", ticket.task_id, exc)
                await ack(delivery)
                return
            await ack(delivery)
            if claim is not None:
                await self._host.execute(claim, slot)
        finally:
            slot.release()

    def _ticket(self, message: QueueMessage) -> Ticket | None:
        task_id = message.data.get("task_id")
        if message.action is not ActionTypes.NEW_TASK or not isinstance(task_id, str):
            return None
        return Ticket(task_id, self._host.service_name)

    async def take_messages(self, handle: Callable[[QueueMessage], Awaitable[None]], consumer: Consumer) -> None:
        """The original's intake: every message is taken as it comes; tasks wait inside until a slot is free."""
        failures = 0
        while True:
            for delivery in await consumer.receive(TAKE_AT_ONCE):
                try:
                    await handle(delivery.message)
                except NotFound as exc:  # an event for a task that is not there: nothing is kept
                    logger.warning("%s", exc)
                except UsageError as exc:
                    await self.bury(delivery, str(exc))
                    continue
                except Unavailable as exc:
                    failures += 1
                    logger.warning("message %s goes back to the queue: %s", delivery.message.id_, exc)
                    await _nack(delivery)
                    await anyio.sleep(self._backoff.delay(failures))
                    continue
                failures = 0
                await ack(delivery)

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Put a message that nobody can use into the dead-letter topic. If that fails it stays where it is."""
        host, message = self._host, delivery.message
        topic = topics.topic(host.topic_namespace, host.service_name)
        logger.error("message %s of topic %s goes to the dead letters: %s", message.id_, topic, reason)
        letter = dead_letter(message, topic, reason, publisher_id=host.publisher_id)
        try:
            await host.message_queue.publish(letter, topics.dead_letter(host.topic_namespace))
        except QueueUnavailable as exc:
            logger.warning("the dead-letter topic took nothing: %s", exc)
            await _nack(delivery)
        else:
            await ack(delivery)

    async def _claim(self, ticket: Ticket) -> Claim | None:
        """Ask a few times. Raises Unavailable; the next call for the same task asks for the same claim."""
        host, task_id = self._host, ticket.task_id
        nonce = self._unanswered.pop(task_id, None) or new_id()
        failures = 0
        while True:
            try:
                return await host.coordinator.claim(ticket, host.instance_id, nonce)
            except Unavailable as exc:
                failures += 1
                if failures >= CLAIM_ATTEMPTS:
                    self._unanswered[task_id] = nonce
                    if len(self._unanswered) > UNANSWERED_CLAIMS:
                        self._unanswered.popitem(last=False)
                    raise
                logger.warning("cannot claim task %s, trying again: %s", task_id, exc)
                await anyio.sleep(self._backoff.delay(failures))

    # Tickets handed in

    async def hand_in(self, ticket: Ticket) -> None:
        """Let a task start when a slot is free. Waits while too many tickets wait; raises Unavailable when closed."""
        try:
            await self._ready_in.send(ticket)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            raise Unavailable(f"{self._host.service_name} is stopping") from None

    def hand_in_nowait(self, ticket: Ticket) -> None:
        """`hand_in` for whoever knows that there is room."""
        self._ready_in.send_nowait(ticket)

    async def take_handed_in(self) -> None:
        """Start the tasks that wait inside the service, one whenever a slot is free."""
        while True:
            ticket = await self._ready_out.receive()
            self._in_hand.append(ticket)
            slot = Slot(self._limiter)
            await slot.ensure()
            self._in_hand.remove(ticket)
            self._host.start_run(self._claim_and_execute, ticket, slot)

    async def _claim_and_execute(self, ticket: Ticket, slot: Slot) -> None:
        try:
            claim = await self._claim(ticket)
            if claim is not None:
                await self._host.execute(claim, slot)
        except Unavailable as exc:
            logger.warning("the ticket of task %s goes to the queue: %s", ticket.task_id, exc)
            await self._publish(ticket)
        except UsageError as exc:
            logger.error("task %s cannot be claimed: %s", ticket.task_id, exc)
        finally:
            slot.release()

    async def close(self, *, publish: bool) -> None:
        """Take no more tickets; with `publish`, put those that wait inside the service on the queue for others."""
        self._ready_in.close()
        left = self._in_hand.copy()
        while True:
            try:
                left.append(self._ready_out.receive_nowait())
            except (anyio.WouldBlock, anyio.EndOfStream):
                break
        self._ready_out.close()
        for ticket in left if publish else ():
            await self._publish(ticket)

    async def _publish(self, ticket: Ticket) -> None:
        host = self._host
        message = QueueMessage(
            publisher_id=host.publisher_id,
            action=ActionTypes.NEW_TASK,
            type=host.service_name,
            data=TaskDefinition(input="", task_id=ticket.task_id, agent_id=host.service_name).model_dump(),
        )
        try:
            await host.message_queue.publish(message, topics.topic(host.topic_namespace, host.service_name))
        except QueueUnavailable as exc:
            logger.warning("the ticket of task %s is left to the coordinator: %s", ticket.task_id, exc)

    # Reservations

    def reserve(self) -> SlotReservation | None:
        """A free slot for a task about to be accepted, if nobody waits for one before it: no run at the limiter, no
        ticket in the queue, and none that was given back for want of a slot."""
        if not self._parked or self._owes:
            return None
        slot = Slot(self._limiter)
        if not slot.take_nowait():
            return None
        self._reserved += 1
        return SlotReservation(self, slot)

    def settle(self, slot: Slot, claim: Claim | None) -> None:
        """A reservation was used, or given back."""
        self._reserved -= 1
        try:
            if claim is None:
                slot.release()
            else:
                self._host.start_run(self._host.execute, claim, slot)
        finally:
            if not self._reserved:
                self._none_reserved.set()
                self._none_reserved = anyio.Event()

    async def wait_none_reserved(self) -> None:
        """Return when no reservation is open: their holders are storing a task, which takes one transaction."""
        while self._reserved:
            await self._none_reserved.wait()


class SlotReservation:
    """See `abc.Reservation`."""

    __slots__ = ("_intake", "_slot", "instance_id")

    def __init__(self, intake: Intake, slot: Slot) -> None:
        self.instance_id = intake.instance_id
        self._intake = intake
        self._slot = slot

    def start(self, claim: Claim) -> None:
        self._intake.settle(self._slot, claim)

    def cancel(self) -> None:
        self._intake.settle(self._slot, None)


async def ack(delivery: Delivery) -> None:
    """Ack as well as the queue can: a message that comes again finds its work done."""
    try:
        await delivery.ack()
    except QueueUnavailable as exc:
        logger.warning("message %s was taken and will come again: %s", delivery.message.id_, exc)


async def _nack(delivery: Delivery) -> None:
    try:
        await delivery.nack()
    except QueueUnavailable as exc:
        logger.warning("message %s comes back when the queue misses its consumer: %s", delivery.message.id_, exc)
