"""One call of a step: its arguments, its flavour, and what its return value means to the broker."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from ..aio import SelfCancelled, call_asyncio, call_native
from ..exceptions import FlavourError
from .checks import tool_error
from .nesting import StepActivity, set_activity
from .options import StepFlavour
from .registry import StepSpec
from .resources import resolve_resources
from .spans import spanned, step_dispatcher, step_tags
from .thread import call_in_thread
from .upstream import (
    AddWaiter,
    CommandRunWorker,
    Context,
    Event,
    InProgressState,
    InternalContextVar,
    RetryAttempt,
    RetryDecision,
    RetryPolicy,
    Returns,
    SentEvent,
    StepFunctionResult,
    StepWorkerContext,
    StepWorkerFailed,
    StepWorkerOutput,
    StepWorkerResult,
    StepWorkerStateContextVar,
    TickStepResult,
    WaitingForEvent,
    Workflow,
    WorkflowRuntimeError,
    decide_retry_delay,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepCall:
    """Everything that one call of a step needs."""

    workflow: Workflow
    run_id: str
    spec: StepSpec
    context: Context[Any]
    command: CommandRunWorker
    worker: InProgressState
    flavour: StepFlavour
    backend: str
    limiter: anyio.CapacityLimiter | None
    now: Callable[[], float]
    activity: StepActivity


async def call_step(call: StepCall) -> list[StepWorkerOutput]:
    """Run the step and return what the broker is to make of it. Exceptions of the step are part of that.

    Cancellation and Ctrl-C pass through. A sync step runs in a worker thread and is abandoned on cancellation
    (`call_in_thread`).
    """
    returns = Returns(return_values=[])
    step_context = StepWorkerContext(
        event=call.command.event,
        state=call.worker.shared_state,
        returns=returns,
        retry=RetryAttempt(
            retry_number=call.worker.attempts,
            first_attempt_at=call.worker.first_attempt_at,
            last_exception=call.worker.last_exception,
            last_failed_at=call.worker.last_failed_at,
            recovery_counts=dict(call.worker.recovery_counts),
        ),
    )
    # The task that runs this call is its own; what is set here is seen by the step and by nobody else.
    StepWorkerStateContextVar.set(step_context)
    # A weak reference: timers of libraries keep copies of the context, which must not keep the workflow alive.
    InternalContextVar.set(weakref.ref(call.context))
    set_activity(call.activity)
    try:
        result = await _invoke(call)
        _refuse_hidden_error(result, call)
        if isinstance(result, AddWaiter):
            returns.return_values.append(result)
        else:
            returns.return_values.extend(_interpret(call.spec, result))
    except Exception as exc:
        returns.return_values.append(StepWorkerFailed(exception=_explain(exc, call), failed_at=call.now()))
    except anyio.get_cancelled_exc_class() as exc:  # noqa: ASYNC103 -- raised on, unless nobody had cancelled
        # On asyncio a step can raise this by itself. The task group would take it for the end of a cancelled task, and
        # the run would wait for the step's result for ever.
        if anyio.current_effective_deadline() == -math.inf:
            raise
        error = SelfCancelled(f"step {call.spec.name!r} ended with a cancellation that nobody asked for")
        error.__cause__ = exc
        returns.return_values.append(StepWorkerFailed(exception=error, failed_at=call.now()))
    except BaseException as exc:  # what is left would end everybody else's runs too
        if _ends_the_program(exc):
            raise
        failed_at = call.now()
        # The group of a nursery that was cancelled and whose clean-up failed: it ends as cancelled. Trio would take its
        # cancellation out and raise the rest out of the run.
        await anyio.lowlevel.checkpoint_if_cancelled()
        returns.return_values.append(StepWorkerFailed(exception=_as_error(exc, call), failed_at=failed_at))
    finally:
        step_context.sends.closed = True
    return [*returns.return_values, *step_context.sends.entries]


def _ends_the_program(exc: BaseException) -> bool:
    """Whether it is not the step's own: Ctrl-C, or the end of its coroutine."""
    if isinstance(exc, BaseExceptionGroup):
        return exc.subgroup((KeyboardInterrupt, GeneratorExit)) is not None
    return isinstance(exc, (KeyboardInterrupt, GeneratorExit))


def _as_error(exc: BaseException, call: StepCall) -> Exception:
    """sys.exit() in a step, and whatever else is no Exception, as one that fails the step."""
    text = f": {exc}" if str(exc) else ""
    error = WorkflowRuntimeError(f"step {call.spec.name!r} raised {type(exc).__name__}{text}")
    error.__cause__ = exc
    return error


async def _invoke(call: StepCall) -> Any:
    spec = call.spec
    function = spec.free_function if spec.free_function is not None else getattr(call.workflow, spec.name)
    enter = call_asyncio if call.flavour == "asyncio" and call.backend == "trio" else call_native
    if spec.is_async:
        return await enter(_call_async, call, function)
    resources: dict[str, Any] = {}
    if spec.config.resources:
        resources = await enter(resolve_resources, call.workflow, spec.config)
    bound = partial(_call_sync, call, function, {**_arguments(call), **resources})
    return await call_in_thread(bound, step=spec.name, run_id=call.run_id, limiter=call.limiter)


async def _call_async(call: StepCall, function: Callable[..., Any]) -> Any:
    call.activity.enter()
    arguments = _arguments(call)
    if call.spec.config.resources:
        arguments.update(await resolve_resources(call.workflow, call.spec.config))
    dispatcher = step_dispatcher(call.workflow)
    try:
        if dispatcher is None:
            return await function(**arguments)
        with step_tags(call.command.event):
            return await spanned(dispatcher, function)(**arguments)
    except WaitingForEvent as waiting:
        # A value from here on: an exception that crosses from one library to the other leaves cycles of frames behind.
        return waiting.add


def _call_sync(call: StepCall, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    dispatcher = step_dispatcher(call.workflow)
    try:
        if dispatcher is None:
            return function(**arguments)
        with step_tags(call.command.event):
            return spanned(dispatcher, function)(**arguments)
    except WaitingForEvent as waiting:
        return waiting.add


def _arguments(call: StepCall) -> dict[str, Any]:
    config = call.spec.config
    if config.collection_param is not None:
        payload = call.worker.shared_state.collection_release_payload
        if payload is None:
            raise WorkflowRuntimeError(
                f"Collect step {call.spec.name!r} was started without its batch: the run's state is damaged."
            )
        arguments: dict[str, Any] = {config.collection_param[0]: list(payload.events)}
    elif call.command.bound_events is not None:
        arguments = dict(call.command.bound_events)
    else:
        arguments = {config.event_name: call.command.event}
    if config.context_parameter:
        arguments[config.context_parameter] = call.context
    return arguments


def _interpret(spec: StepSpec, result: Any) -> list[StepWorkerResult]:
    """Turn a step's return value into results. The rules are upstream's: a list fans out only where it is declared."""
    if isinstance(result, list) and spec.config.is_fan_out:
        for item in result:
            if not isinstance(item, Event):
                raise WorkflowRuntimeError(
                    f"Step function {spec.name} returned a list containing {type(item).__name__} instead of an Event "
                    "instance."
                )
        if not result:  # nothing is emitted, but the stream opens and closes, so that joins fire with []
            return [StepWorkerResult(result=None, fanned_out=True)]
        return [StepWorkerResult(result=item, fanned_out=True) for item in result]
    if result is not None and not isinstance(result, Event):
        raise WorkflowRuntimeError(
            f"Step function {spec.name} returned {type(result).__name__} instead of an Event instance."
        )
    if spec.config.is_fan_out and result is not None:
        declared = any(isinstance(t, type) and isinstance(result, t) for t in spec.config.bare_return_types)
        if not declared:
            raise WorkflowRuntimeError(
                f"Step function {spec.name} returned a bare {type(result).__name__}, which its annotation declares "
                "only inside a list. Return a list of one to fan out, or declare the bare type too "
                "(for example -> list[A] | B)."
            )
    return [StepWorkerResult(result=result)]


_ASYNCIO_IN_TRIO = (
    "no running event loop",
    "no current event loop",
    "trio.run received unrecognized yield message",
    "trio got unexpected",
    # With a hosted loop around, asyncio finds the loop and misses its task.
    "should be used inside a task",
    "cannot determine the parent task",
    "'nonetype' object has no attribute 'create_",  # asyncio.gather and others, once trio-asyncio was imported
)
_TRIO_IN_ASYNCIO = ("task got bad yield", "must be called from async context", "only works in an async trio context")


def _explain(exc: Exception, call: StepCall) -> Exception:
    """Replace the error of a library that met the wrong event loop by one that names the step and the setting."""
    if not isinstance(exc, (RuntimeError, TypeError, AttributeError)) or isinstance(exc, SelfCancelled):
        return exc
    text = str(exc).lower()
    speaks_asyncio = call.flavour == "asyncio" or call.backend == "asyncio"
    if not speaks_asyncio and any(mark in text for mark in _ASYNCIO_IN_TRIO):
        called, hint = "asyncio", _use_flavour("asyncio")
    elif speaks_asyncio and any(mark in text for mark in _TRIO_IN_ASYNCIO):
        called = "Trio"
        hint = _use_flavour("anyio") if call.backend == "trio" else "run it on Trio, or use AnyIO in the step"
    else:
        return exc
    error = FlavourError(
        f"step {call.spec.name!r} runs in the {call.flavour!r} flavour on {call.backend} and called {called}: {exc}",
        hint=hint,
        step=call.spec.name,
        flavour=call.flavour,
    )
    error.__cause__ = exc
    return error


def _refuse_hidden_error(result: Any, call: StepCall) -> None:
    """Raise what an agent's tool raised if it met the wrong library: the agent would tell nobody but its LLM."""
    error = tool_error(result)
    if error is not None and (explained := _explain(error, call)) is not error:
        raise explained


def _use_flavour(other: StepFlavour) -> str:
    return f"set the step flavour to {other!r} (flavour={other!r}, --step-flavour {other}), or use AnyIO in the step"


def result_tick(
    command: CommandRunWorker,
    worker: InProgressState,
    outputs: list[StepWorkerOutput],
    *,
    policy: RetryPolicy | None,
    run_id: str,
    now: float,
) -> TickStepResult:
    """What the broker is told about an ended call."""
    results: list[StepFunctionResult] = []
    sends: list[SentEvent] = []
    for output in outputs:
        if isinstance(output, SentEvent):
            sends.append(output)
        elif isinstance(output, StepWorkerFailed):
            results.append(_decided(command, worker, output, policy, run_id))
        else:
            results.append(output)
    return TickStepResult(
        step_id=command.step_id,
        worker_id=command.id,
        invocation_namespace=command.invocation_namespace,
        event=command.event,
        result=results,
        stamped_at=now,
        invocation_id=command.invocation_id,
        sends=sends,
    )


def _decided(
    command: CommandRunWorker,
    worker: InProgressState,
    failed: StepWorkerFailed,
    policy: RetryPolicy | None,
    run_id: str,
) -> StepWorkerFailed:
    """The failure with its retry decided now: a snapshot taken later must not ask the policy again."""
    exception = failed.exception
    delay: float | None = None
    if not isinstance(exception, FlavourError):  # no retry makes a step speak the other library
        try:
            delay = decide_retry_delay(
                policy,
                elapsed_time=failed.failed_at - worker.first_attempt_at,
                failures=worker.attempts + 1,
                exception=exception,
                run_id=run_id,
                step_name=str(command.step_id),
            )
        except Exception as policy_error:  # a policy that cannot decide ends the retries with its own error
            policy_error.__cause__ = exception
            exception = policy_error
    return StepWorkerFailed(
        exception=exception,
        failed_at=failed.failed_at,
        retry_decision=RetryDecision(delay=delay),
        first_attempt_at=worker.first_attempt_at,
    )
