"""`verbose=True`: upstream's own lines about a run, printed or logged where upstream would."""

from __future__ import annotations

from .inline import drive_inline
from .upstream import Event, InternalRunAdapter, WaitResult, Workflow, WorkflowTick, verbose_adapter


class Narrator:
    """Says what happens in a run. The lines are upstream's, made by its adapter on top of one that does nothing."""

    __slots__ = ("_adapter",)

    def __init__(self, adapter: InternalRunAdapter) -> None:
        self._adapter = adapter

    def event(self, event: Event) -> None:
        """Say what is to be said about a published event."""
        drive_inline(self._adapter.write_to_event_stream(event))

    def tick(self, tick: WorkflowTick) -> None:
        """Say what is to be said about a reduced tick."""
        drive_inline(self._adapter.on_tick(tick))


def narrator_of(workflow: Workflow) -> Narrator | None:
    """A narrator for a workflow that was made with `verbose=True`, None for others."""
    adapter = verbose_adapter(workflow, _SILENCE)
    return Narrator(adapter) if adapter is not None else None


class _Silence(InternalRunAdapter):
    @property
    def run_id(self) -> str:
        return ""

    async def write_to_event_stream(self, event: Event) -> None:
        """Nothing: the run publishes its events itself."""

    async def get_now(self) -> float:
        return 0.0

    async def send_event(self, tick: WorkflowTick) -> None:
        """Nothing: the run takes its events itself."""

    async def wait_receive(self, timeout_seconds: float | None = None) -> WaitResult:
        raise RuntimeError("nothing is received here")


_SILENCE = _Silence()
