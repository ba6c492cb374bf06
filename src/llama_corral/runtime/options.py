"""What may be set about a run, what may be seen of it, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import anyio
import anyio.lowlevel

StepFlavour = Literal["anyio", "asyncio"]
"""Which library an async step's body speaks on Trio. On the asyncio backend both are the same."""

DEFAULT_EVENT_BUFFER = 10_000
DEFAULT_MAILBOX = 10_000
INTERNAL_MAILBOX = 100_000
"""Events that the steps of one run may have sent and no step has taken. Beyond it the sending step fails."""
SYNC_STEP_THREADS = 40


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is run. See `open_run` for the meaning of each."""

    flavour: StepFlavour = "anyio"
    event_buffer: int = DEFAULT_EVENT_BUFFER
    mailbox: int = DEFAULT_MAILBOX
    internal_events: bool = False
    sync_limiter: anyio.CapacityLimiter | None = None


@dataclass(frozen=True, slots=True)
class RunStatistics:
    """A look at a run. `held_events`: outside events that nothing has taken yet. `lost_events`: published events that
    fell out of the ring. `working_steps`: step calls that were started and have not ended."""

    run_id: str
    is_done: bool
    is_idle: bool
    working_steps: int
    ticks: int
    published_events: int
    buffered_events: int
    lost_events: int
    held_events: int
    timers: int


_sync_limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar("llama_corral_sync_steps")


def sync_step_limiter() -> anyio.CapacityLimiter:
    """The limiter of sync steps' threads in this event loop: their own, so that a blocked step never delays a commit."""
    limiter = _sync_limiter.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(SYNC_STEP_THREADS)
        _sync_limiter.set(limiter)
    return limiter
