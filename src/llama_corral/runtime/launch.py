"""What upstream's `workflow.run()` hands to a runtime, and the run that is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .deadlines import carried_deadlines
from .home import Home
from .live_state import live
from .options import RunOptions
from .state import open_state
from .upstream import BaseSerializer, BrokerState, StartEvent, Workflow

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True, slots=True)
class Launch:
    """A run to be: the arguments of `Runtime.run_workflow`, in its order."""

    run_id: str
    workflow: Workflow
    init_state: BrokerState
    start_event: StartEvent | None = None
    serialized_state: dict[str, Any] | None = None
    serializer: BaseSerializer | None = None

    def make(self, run_class: type[Run], options: RunOptions, home: Home) -> Run:
        """The run, not yet driven."""
        return run_class(
            self.workflow,
            state=live(self.init_state),
            store=open_state(self.workflow, self.serialized_state, self.serializer),
            start_event=self.start_event,
            serializer=self.serializer,
            run_id=self.run_id,
            options=options,
            home=home,
            deadlines=carried_deadlines(self.serialized_state),
        )
