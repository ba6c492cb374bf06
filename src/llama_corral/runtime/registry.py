"""What is known of a workflow before it runs, worked out once a workflow and not once a run."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..aio import FlavourSemaphore
from .options import StepFlavour
from .upstream import (
    StepConfig,
    WeakIdentityKeyDictionary,
    Workflow,
    infer_state_type,
    step_config,
    step_functions,
    step_version,
    workflow_concurrency,
)

F = TypeVar("F", bound=Callable[..., Any])

_FLAVOUR = "_llama_corral_flavour"


def speaks(flavour: StepFlavour) -> Callable[[F], F]:
    """Decorates a step that speaks this flavour in every run, whatever that of the run is."""

    def mark(function: F) -> F:
        setattr(function, _FLAVOUR, flavour)
        return function

    return mark


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step: its name, its configuration and how to call it.

    `free_function` is set for a step that was added to the class from outside; a method is looked up on the workflow at
    each call, so that the registry holds no reference to the instance. `flavour` is set for one that `speaks` its own.
    """

    name: str
    config: StepConfig
    is_async: bool
    free_function: Any = None
    flavour: StepFlavour | None = None


@dataclass(frozen=True, slots=True)
class RegisteredWorkflow:
    """`steps` by name, the type of `ctx.store`, the version that says when to look again, and the turns of
    `num_concurrent_runs`, one semaphore for each thread that runs the workflow."""

    steps: dict[str, StepSpec]
    state_type: type[Any]
    version: int
    turns: dict[int, FlavourSemaphore] = field(default_factory=dict)


_registered: WeakIdentityKeyDictionary[Workflow, RegisteredWorkflow] = WeakIdentityKeyDictionary()


def register(workflow: Workflow) -> RegisteredWorkflow:
    """The workflow's registration, made at the first call and when a step was added since."""
    known = _registered.get(workflow)
    if known is not None and known.version == step_version(workflow):
        return known
    steps: dict[str, StepSpec] = {}
    for name, function in step_functions(workflow).items():
        steps[name] = StepSpec(
            name=name,
            config=step_config(function),
            is_async=inspect.iscoroutinefunction(function),
            free_function=None if hasattr(workflow, name) else function,
            flavour=getattr(function, _FLAVOUR, None),
        )
    new = RegisteredWorkflow(steps=steps, state_type=infer_state_type(workflow), version=step_version(workflow))
    if known is not None:
        new.turns.update(known.turns)  # runs that have one give it back there
    _registered[workflow] = new
    return new


def turns_of(workflow: Workflow, registered: RegisteredWorkflow) -> FlavourSemaphore | None:
    """The semaphore under which the caller's thread runs the workflow, None where `num_concurrent_runs` sets no limit."""
    limit = workflow_concurrency(workflow)
    if limit is None:
        return None
    thread = threading.get_ident()
    turns = registered.turns.get(thread)
    if turns is None:
        turns = registered.turns[thread] = FlavourSemaphore(limit)
    return turns
