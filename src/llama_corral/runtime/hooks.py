"""What the owner of a run decides and hears: slots, published events, idleness."""

from __future__ import annotations

import anyio

from .upstream import Event


class RunHooks:
    """The owner's side of a run. The base does nothing: a run without an owner is bounded by nothing.

    Attributes:
        identity: What this run and no other is called, also where somebody else goes on with it or begins it again; None
            where it has no such name. What a step starts elsewhere under a name made of it is found again by that step.
    """

    identity: str | None = None

    async def before_step(self, step: str) -> None:
        """Awaited in the step's own task before its body starts: the place to wait for a slot or a slow publisher."""

    def on_event(self, event: Event) -> None:
        """A published event, in order. May be called from asyncio-flavoured code: it must neither wait nor create
        primitives of either library (setting an event or appending to a deque is fine)."""

    def on_step_done(self) -> None:
        """A step call has returned and what follows from it has been decided; the run goes on. The run may be snapshotted
        here: what was published so far has been told, and what starts next has not started. Called from the run's own
        tasks, and from asyncio-flavoured code; it must neither wait nor create primitives of either library."""

    def on_unwinding(self) -> None:
        """The run is over, or being cancelled, and steps of it, or runs that they started, are still at work: they have been
        cancelled, and `drive` returns when the last of them has unwound. Called once, by the run's driver."""

    def on_idle(self) -> None:
        """No step is working: only an outside event or a timer can change that. Called once each time it happens."""

    def is_handed_on(self) -> bool:
        """Whether the run is being closed because somebody else goes on with it: what a step left working elsewhere is
        needed there. Asked while the run unwinds."""
        return False


class Slot:
    """One run's place under a capacity limiter: taken where a step starts, given back when the run is idle.

    The limiter counts the Slot object as the borrower, so any task of the run may take or give back the place. An owner
    calls `release` once more when the run is over.

    Args:
        limiter: The cap. Its `total_tokens` may be changed at any time; nothing starts until fewer are borrowed.
    """

    __slots__ = ("_acquiring", "_limiter", "held")

    def __init__(self, limiter: anyio.CapacityLimiter) -> None:
        self._limiter = limiter
        self._acquiring: anyio.Event | None = None
        self.held = False

    def take_nowait(self) -> bool:
        """Take the place if one is free now; False otherwise."""
        if self.held:
            return True
        try:
            self._limiter.acquire_on_behalf_of_nowait(self)
        except anyio.WouldBlock:
            return False
        self.held = True
        return True

    async def ensure(self) -> None:
        """Return once the run has its place. Several tasks of the run may call it: one of them waits at the limiter,
        because a limiter knows a borrower once, and the others wait for that one."""
        while not self.held:
            if self._acquiring is not None:
                await self._acquiring.wait()
                continue
            self._acquiring = anyio.Event()
            try:
                await self._limiter.acquire_on_behalf_of(self)
                self.held = True
            finally:
                self._acquiring.set()
                self._acquiring = None

    def release(self) -> None:
        """Give the place back; nothing happens if the run has none."""
        if self.held:
            self.held = False
            self._limiter.release_on_behalf_of(self)


class SlotHooks(RunHooks):
    """A run under a slot and nothing else."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    async def before_step(self, step: str) -> None:
        if not self.slot.held:
            await self.slot.ensure()

    def on_idle(self) -> None:
        self.slot.release()
