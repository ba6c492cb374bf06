"""A small world around a real store: instances that claim, report, release, die and come back; a queue that loses, doubles
and reorders; a clock that is set. Every call to the store is told to `Promised`, and the answers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from llama_corral.exceptions import Conflict, NotFound
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import (
    Accepted,
    Checkpoint,
    Claim,
    ClaimRequest,
    ContextUpdate,
    HeldTask,
    InstanceRecord,
    NewTask,
    Report,
    ReportAnswer,
    RetryPolicy,
    ServiceRecord,
    Terminal,
    Ticket,
)
from llama_corral.stores import SqlStore

from .ground import Ground
from .promised import Life

Fate = Literal["heard", "lost call", "lost answer", "twice"]
FATES: Final[tuple[Fate, ...]] = ("heard", "heard", "heard", "lost call", "lost answer", "twice")
RETRY: Final = RetryPolicy(backoff=2.0)


@dataclass
class Instance:
    """A process. A dead one does nothing any more; one that was reaped too early does not know."""

    instance_id: str
    alive: bool = True


@dataclass(frozen=True)
class Release:
    task_id: str
    epoch: int
    checkpoint: Checkpoint | None
    idle: bool = False
    wake_at: float | None = None


@dataclass
class Run:
    """A claimed task in the hands of an instance."""

    claim: Claim
    instance: Instance
    life: Life
    """Which life of the task's id: it may be deleted and accepted again."""
    seq: int = 0
    inbox_read: int = 0
    pending: Report | Release | None = None
    """The call whose answer has not come. It is repeated unchanged before anything else is said."""
    is_over: bool = False

    @property
    def task_id(self) -> str:
        return self.claim.task_id


class World(Ground):
    """Each method is one call of somebody, or of several at once; `settling.settle` lets everything come to its end."""

    def __init__(self, store: SqlStore) -> None:
        super().__init__(store)
        self.instances: list[Instance] = []
        self.registered: set[str] = set()
        self.runs: list[Run] = []
        self.said: list[tuple[Report | Release | ClaimRequest, Life | None]] = []
        """Everything that was ever said: any of it may arrive once more."""
        self.unheard_claims: list[tuple[ClaimRequest, Instance]] = []
        self.unheard_accepts: list[tuple[NewTask, ClaimRequest | None, Instance | None]] = []

    # Instances

    def alive(self) -> list[Instance]:
        return [instance for instance in self.instances if instance.alive]

    async def start_instance(self) -> Instance:
        instance = Instance(f"i{len(self.instances)}")
        self.instances.append(instance)
        await self.register(instance)
        return instance

    async def register(self, instance: Instance) -> None:
        record = InstanceRecord(instance.instance_id, "svc", 8, self.now)
        await self.store.put_service(ServiceRecord("svc", "{}", 1.0), record)
        self.registered.add(instance.instance_id)

    def kill(self, instance: Instance) -> None:
        instance.alive = False

    async def reap(self, ids: list[str]) -> None:
        lost = [life for instance_id in ids for life in self.promised.owned_by(instance_id)]
        self.promised.lose(lost)
        self.registered -= set(ids)
        self.publish((await self.store.reap(ids, self.now)).tickets)

    async def missed_when_silent(self) -> set[str]:
        """The instances that a reaper judges by their heartbeats."""
        known = {instance.instance_id for instance in await self.store.list_instances()}
        assert known == self.registered
        strangers = set(await self.store.list_strangers())
        owners = {life.owner for life in self.promised.lives.values() if life.place == "owned"}
        assert strangers == owners - known
        return known | strangers

    async def heartbeat(self, instance: Instance, *, heard: bool = True) -> None:
        hands = {run.task_id: run for run in self.runs if run.instance is instance and not run.is_over}
        held = [HeldTask(run.task_id, run.claim.epoch, run.inbox_read) for run in hands.values()]
        answer = await self.store.heartbeat(instance.instance_id, held)
        owned = {life.task.task_id: life for life in self.promised.owned_by(instance.instance_id)}
        ours = {run.task_id for run in hands.values() if self.owns(run)}
        assert answer.known == (instance.instance_id in self.registered)
        assert set(answer.fenced) == hands.keys() - ours
        news = {task for task in ours if owned[task].cancel or len(owned[task].inbox) > hands[task].inbox_read}
        assert set(answer.news) == news
        strays = {(task, life.epoch) for task, life in owned.items() if task not in ours}
        assert {(stray.task_id, stray.epoch) for stray in answer.strays} == strays
        if not heard:
            return
        for task_id in answer.fenced:
            hands[task_id].is_over = True
        if not answer.known:
            await self.register(instance)
        if answer.strays:
            await self.reclaim(instance.instance_id, answer.strays)

    async def reclaim(self, instance_id: str, strays: tuple[HeldTask, ...]) -> None:
        owned = {(life.task.task_id, life.epoch): life for life in self.promised.owned_by(instance_id)}
        named = [(stray.task_id, stray.epoch) for stray in strays]
        self.promised.lose([owned[stray] for stray in named if stray in owned])
        self.publish((await self.store.reclaim(instance_id, strays, self.now)).tickets)

    def owns(self, run: Run) -> bool:
        life = run.life
        is_there = self.promised.lives.get(run.task_id) is life
        owner = run.instance.instance_id
        return is_there and (life.place, life.epoch, life.owner) == ("owned", run.claim.epoch, owner)

    # Accept and claim

    async def accept(self, task: NewTask, by: Instance | None, fate: Fate = "heard") -> None:
        request = None if by is None else ClaimRequest(task.task_id, by.instance_id, f"n{self.number()}", self.now)
        if fate != "lost call":
            accepted = await self._accept(task, request)
            if fate == "twice":
                accepted = await self._accept(task, request) or accepted
            if fate != "lost answer":
                self._hear_accepted(accepted, by)
                return
        self.unheard_accepts.append((task, request, by))

    async def repeat_accept(self, position: int) -> None:
        task, request, by = self.unheard_accepts.pop(position)
        self._hear_accepted(await self._accept(task, request), by)

    async def _accept(self, task: NewTask, request: ClaimRequest | None) -> Accepted | None:
        expected = self.promised.accept(task, request)
        life = self.promised.lives.get(task.task_id)
        try:
            accepted = await self.store.accept(task, request)
        except NotFound:
            assert expected == "no session"
            return None
        except Conflict:
            assert expected in ("other content", "busy")
            return None
        assert life is not None
        assert (accepted.created, expected) in ((True, "created"), (False, "known"))
        assert accepted.status == life.stored_status
        is_ours = request is not None and (life.place, life.owner, life.nonce) == (
            "owned", request.instance_id, request.nonce,
        )  # fmt: skip
        assert (accepted.claim is not None) == is_ours
        if accepted.created and accepted.status is TaskStatus.QUEUED:
            self.publish([Ticket(task.task_id, task.service_name)])
        return accepted

    def _hear_accepted(self, accepted: Accepted | None, by: Instance | None) -> None:
        if accepted is not None and accepted.claim is not None and by is not None:
            self._begin(accepted.claim, by)

    async def claim(self, ticket: Ticket, by: Instance, fate: Fate = "heard") -> None:
        request = ClaimRequest(ticket.task_id, by.instance_id, f"n{self.number()}", self.now)
        self.said.append((request, None))
        if fate != "lost call":
            claim = await self.tell_claim(request)
            if fate == "twice":
                claim = await self.tell_claim(request)
            if fate != "lost answer":
                self._begin(claim, by)
                return
        self.unheard_claims.append((request, by))

    async def repeat_claim(self, position: int) -> None:
        request, by = self.unheard_claims.pop(position)
        self._begin(await self.tell_claim(request), by)

    async def tell_claim(self, request: ClaimRequest) -> Claim | None:
        expected = self.promised.claim(request)
        claim = await self.store.claim(request)
        assert (claim is None) == (expected is None)
        if claim is not None:
            self._check_claim(claim)
        return claim

    def _check_claim(self, claim: Claim) -> None:
        life = self.promised.lives[claim.task_id]
        assert (claim.epoch, claim.attempt, claim.next_index) == (life.epoch, life.failures + 1, len(life.log))
        assert (claim.cancel_requested, claim.state_error) == (life.cancel, None)
        version, payload = self.promised.contexts.get(life.line, (0, "")) if life.line else (0, "")
        assert (0 if claim.context is None else claim.context.version) == version
        assert claim.context is None or claim.context.payload == payload
        applied = 0 if life.checkpoint is None else life.checkpoint.inbox_applied
        assert [(event.seq, event.payload) for event in claim.inbox] == list(enumerate(life.inbox, 1))[applied:]
        assert (claim.checkpoint is None) == (life.checkpoint is None)
        if claim.checkpoint is not None and life.checkpoint is not None:
            assert claim.checkpoint.snapshot == life.checkpoint.snapshot
            assert claim.checkpoint.inbox_applied == applied
            assert claim.checkpoint.event_count == life.checkpoint.event_count
        assert claim.retry == life.task.retry

    def _begin(self, claim: Claim | None, by: Instance) -> None:
        if claim is None or not by.alive:
            return
        if any((run.task_id, run.claim.epoch) == (claim.task_id, claim.epoch) for run in self.runs):
            return  # heard twice
        run = Run(claim, by, self.promised.lives[claim.task_id])
        run.inbox_read = max([event.seq for event in claim.inbox], default=self._applied(claim))
        self.runs.append(run)

    @staticmethod
    def _applied(claim: Claim) -> int:
        return 0 if claim.checkpoint is None else claim.checkpoint.inbox_applied

    # What runs say

    def working(self) -> list[Run]:
        """Runs that are at work, as far as they know."""
        return [run for run in self.runs if run.instance.alive and not run.is_over]

    def stale(self) -> list[Run]:
        """Runs that nobody should listen to any more."""
        return [run for run in self.runs if run.is_over or not self.owns(run)]

    async def say(self, run: Run, call: Report | Release, fate: Fate = "heard") -> None:
        run.pending = call
        self.said.append((call, run.life))
        if fate == "lost call":
            return
        answer = await self.tell(call, run.life, tickets_lost=fate == "lost answer")
        if fate == "twice":
            answer = await self.tell(call, run.life)
        if fate != "lost answer":
            self._hear(run, call, answer)

    async def repeat(self, run: Run) -> None:
        assert run.pending is not None
        self._hear(run, run.pending, await self.tell(run.pending, run.life))

    async def tell(self, call: Report | Release, of: Life | None, *, tickets_lost: bool = False) -> ReportAnswer:
        is_there = self.promised.lives.get(call.task_id) in (None, of)
        expected = "fenced"  # whatever another life of the same id says
        if isinstance(call, Report):
            expected = self.promised.report(call) if is_there else expected
            answer = await self.store.report(call)
        else:
            arguments = (call.task_id, call.epoch, call.checkpoint, self.now)
            expected = self.promised.release(*arguments, call.idle, call.wake_at) if is_there else expected
            answer = await self.store.release(*arguments, idle=call.idle, wake_at=call.wake_at)
        assert answer.status == {"new": "ok", "again": "ok"}.get(expected, expected)
        life = self.promised.lives.get(call.task_id)
        if life is not None and answer.status == "ok":
            assert answer.next_index == len(life.log)
            if isinstance(call, Report) and expected == "new":
                is_back = call.terminal is not None and life.is_open
                assert answer.retry_at == (life.not_before if is_back else None)
        self.publish(answer.tickets, lost=tickets_lost)
        return answer

    def _hear(self, run: Run, call: Report | Release, answer: ReportAnswer) -> None:
        run.pending = None
        if answer.status != "ok" or isinstance(call, Release) or call.terminal is not None:
            run.is_over = True

    def checkpoint(self, run: Run, *, progress: bool = True) -> Checkpoint:
        return Checkpoint(f'{{"at":{self.number()}}}', run.inbox_read, "f", progress=progress)

    def report(self, run: Run, *, events: int = 0, waiting: bool | None = None, **more: Any) -> Report:
        run.seq += 1
        return Report(run.task_id, run.claim.epoch, run.seq, self.now, self.payloads(events), waiting, **more)

    def ending(self, run: Run, status: TaskStatus, *, off: int = 0, retryable: bool = False) -> Report:
        """`off`: by how much the context's version is not the one that the run started from."""
        error = None
        if status is not TaskStatus.COMPLETED:
            error = ErrorRecord(type="ValueError", message="no", retryable=retryable)
        held = 0 if run.claim.context is None else run.claim.context.version
        context = ContextUpdate(max(0, held + off), f'{{"c":{self.number()}}}')
        terminal = Terminal(status, "1" if error is None else None, "1" if error is None else "no", error)
        return self.report(run, events=1, terminal=terminal, context=context)

    async def pull(self, run: Run, *, heard: bool = True) -> None:
        page = await self.store.pull(run.task_id, run.claim.epoch, run.inbox_read)
        life = self.promised.lives.get(run.task_id)
        owned = life is run.life and life.place == "owned" and life.epoch == run.claim.epoch
        assert page.status == ("deleted" if life is None else "ok" if owned else "fenced")
        if life is None or not owned:
            run.is_over = run.is_over or heard
            return
        assert (page.head, page.cancel_requested) == (len(life.inbox), life.cancel)
        unread = list(enumerate(life.inbox, 1))[run.inbox_read :]
        assert [(event.seq, event.payload) for event in page.events] == unread
        if heard:
            run.inbox_read = page.head
