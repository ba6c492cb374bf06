"""What workers run that die by their own hand: where CORRAL_TEST_DIE says. One that is started without it goes on."""

from __future__ import annotations

import os
import signal
from typing import Any

from flows import Person, Steps, die_at, mark, marks_of
from workflows import Workflow, step
from workflows.events import StartEvent, StopEvent

from llama_corral.services.execution import TaskExecution
from llama_corral.services.http_coordinator import HttpCoordinator

claim, report, execute = HttpCoordinator.claim, HttpCoordinator.report, TaskExecution.execute


async def claim_and_die(self: HttpCoordinator, *args: Any) -> Any:
    claimed = await claim(self, *args)
    if claimed is not None:
        die_at("claim unanswered")
    return claimed


async def execute_and_die(self: TaskExecution) -> Any:
    die_at("claimed")
    return await execute(self)


async def report_and_die(self: HttpCoordinator, what: Any) -> Any:
    if what.terminal is not None:
        die_at("ending unsent")
    answer = await report(self, what)
    if what.terminal is not None:
        die_at("ending unanswered")
    if what.checkpoint is not None and any(event.type == "Done" for event in what.events):
        die_at("between steps")
    return answer


if "CORRAL_TEST_DIE" in os.environ:
    HttpCoordinator.claim = claim_and_die  # type: ignore[method-assign,assignment]
    HttpCoordinator.report = report_and_die  # type: ignore[method-assign]
    TaskExecution.execute = execute_and_die  # type: ignore[method-assign]


class Poison(Workflow):
    """Takes its process with it, as often as it is told."""

    @step
    async def take(self, ev: StartEvent) -> StopEvent:
        mark(ev.name, "take")
        if marks_of(ev.name) <= ev.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        return StopEvent(result=ev.name)


steps = Steps(timeout=None)
person = Person(timeout=None)
poison = Poison(timeout=None)
