"""The contract with upstream, first half: the names, signatures and fields that `runtime/upstream.py` relies on.

If a test here fails after an upgrade of llama-index-workflows, the message names what moved. Compare it with the
runtime, adapt `runtime/upstream.py`, and write down here what is there now. What the reducer does with ticks is the
second half, in `test_upstream_ticks.py`. Both hold for every version that pyproject allows.

Nothing is imported from the runtime: with a name gone it cannot be imported, and this is to say which name.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import typing
from pathlib import Path

import pytest

import llama_corral

RUNTIME = Path(llama_corral.__file__).parent / "runtime"
SOURCE = RUNTIME / "upstream.py"
UPSTREAM = ("workflows", "llama_index_instrumentation")


def imports(path: Path) -> list[tuple[str, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in UPSTREAM]


def find(module, path):
    """What is at a dotted path in a module. Fails with the part that moved."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(f"upstream moved the module {module!r}, from which {path!r} was taken")
    for number, name in enumerate(path.split(".")):
        if not hasattr(found, name):
            where = ".".join([module, *path.split(".")[:number]])
            pytest.fail(f"upstream moved {name!r}: it is not in {where!r} any more")
        found = getattr(found, name)
    return found


def flat(table):
    return [(module, path, expected) for module, paths in table.items() for path, expected in paths.items()]


@pytest.mark.parametrize(("module", "name"), imports(SOURCE))
def test_every_name_is_there(module, name):
    find(module, name)


def test_nobody_else_in_the_runtime_touches_upstream():
    others = {path.name: imports(path) for path in RUNTIME.rglob("*.py") if path != SOURCE}
    assert len(others) > 10
    assert not {name: found for name, found in others.items() if found}


# Parameters of what the runtime calls, and of what it overrides. `=` marks those with a default.
SIGNATURES = {
    "workflows.workflow": {
        "Workflow.run": "self, ctx=, start_event=, **kwargs",
        "Workflow._get_start_event_instance": "self, start_event, **kwargs",
        "Workflow._get_steps": "self",
        "Workflow._switch_runtime": "self, new_runtime",
        "Workflow._validate": "self, *, validate_resource_configs=, validate_resources=, force=",
        "Workflow._validate_valid_step_message": "self, step, message",
    },
    "workflows.handler": {
        "WorkflowHandler": "workflow, external_adapter, ctx=",
        "WorkflowHandler.cancel_run": "self, *, timeout=",
        "WorkflowHandler.stream_events": "self, expose_internal=",
    },
    "workflows.context": {
        "Context._create_face": "face",
        "Context.from_dict": "workflow, data, serializer=",
        "Context.to_dict": "self, serializer=, *, include_state=",
    },
    "workflows.context.pre_context": {"PreContext": "workflow, previous_context=, serializer="},
    "workflows.context.internal_context": {
        "InternalContext": "internal_adapter, workflow",
        "InternalContext._execute_task": "self, coro",
        "InternalContext._get_step_ctx": "fn",
        "InternalContext.cancel_background_tasks": "self",
        "InternalContext.retry_info": "self",
        "InternalContext.send_event": "self, message, step=",
        "InternalContext.write_event_to_stream": "self, ev",
    },
    "workflows.context.external_context": {
        "ExternalContext": "workflow, external_adapter, serializer=",
        "ExternalContext._execute_task": "self, coro",
        "ExternalContext.to_dict": "self, serializer=, *, include_state=",
    },
    "workflows.context.state_store": {
        "InMemoryStateStore": "initial_state",
        "InMemoryStateStore.from_dict": "serialized_state, serializer",
        "infer_state_type": "workflow",
        "is_durable_serialized_state": "data",
    },
    "workflows._event_matching": {
        "event_matches": "event, accepted, *, allow_subclasses",
        "step_accepts_event": "event, accepted_events, *, allow_subclasses",
    },
    "workflows._event_summary": {"summarize_event": "event, max_length="},
    "workflows.runtime.control_loop.reduce": {
        "_reduce_tick": "tick, init, now_seconds, run_id=",
        "_decide_retry_delay": "policy, *, elapsed_time, failures, exception, run_id, step_name",
    },
    "workflows.runtime.types.internal_state": {
        "BrokerState.deepcopy": "self",
        "BrokerState.from_serialized": "serialized, workflow, serializer",
        "BrokerState.from_workflow": "workflow",
        "BrokerState.rehydrate_with_ticks": "self",
        "BrokerState.to_serialized": "self, serializer",
        "InternalStepWorkerState._deepcopy": "self",
    },
    "workflows.runtime.types.step_id": {"StepId.root": "name"},
    "workflows.runtime.types.results": {
        "StepWorkerContext.record_send": "self, event, step_id, recovery_counts",
        "WaitingForEvent": "add",
    },
    "workflows.runtime.types.plugin": {
        "Runtime": "*, default_serializer=",
        "Runtime.get_external_adapter": "self, run_id",
        "Runtime.get_internal_adapter": "self, workflow",
        "Runtime.get_serializer": "self, workflow",
        "Runtime.register": "self, workflow",
        "Runtime.registering": "self",
        "Runtime.run_workflow": "self, run_id, workflow, init_state, start_event=, serialized_state=, serializer=",
        "Runtime.track_workflow": "self, workflow",
        "Runtime.untrack_workflow": "self, workflow",
        "InternalRunAdapter.on_tick": "self, tick",
        "InternalRunAdapter.send_event": "self, tick",
        "InternalRunAdapter.wait_receive": "self, timeout_seconds=",
        "InternalRunAdapter.write_to_event_stream": "self, event",
        "ExternalRunAdapter.get_state_store": "self, namespace=",
        "RegisteredWorkflow": "workflow, workflow_run_fn, steps",
        "WeakIdentityKeyDictionary": "",
        "WeakIdentityKeyDictionary.get": "self, key",
    },
    "workflows.runtime.runtime_decorators": {"BaseRuntimeDecorator": "decorated, *, default_serializer="},
    "workflows.runtime.verbose": {
        "VerboseDecorator": "decorated",
        "_VerboseInternalRunAdapter": "decorated, output",
        "_VerboseInternalRunAdapter.on_tick": "self, tick",
        "_VerboseInternalRunAdapter.write_to_event_stream": "self, event",
    },
    "llama_index_instrumentation": {"get_dispatcher": "name="},
    "llama_index_instrumentation.dispatcher": {
        "Dispatcher.capture_propagation_context": "self",
        "Dispatcher.event": "self, event, **kwargs",
        "Dispatcher.restore_propagation_context": "self, context",
        "Dispatcher.span": "self, func",
        "Dispatcher.span_drop": "self, id_, bound_args, instance=, err=, **kwargs",
        "Dispatcher.span_enter": "self, id_, bound_args, instance=, parent_id=, tags=, **kwargs",
        "Dispatcher.span_exit": "self, id_, bound_args, instance=, result=, **kwargs",
        "instrument_tags": "new_tags",
    },
}


def parameters(function):
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        shown.append(f"{stars}{parameter.name}{'' if parameter.default is parameter.empty else '='}")
    return ", ".join(shown)


@pytest.mark.parametrize(("module", "path", "expected"), flat(SIGNATURES))
def test_callables_take_what_we_give(module, path, expected):
    actual = parameters(find(module, path))
    assert actual == expected, f"upstream changed the parameters of {path}: ({actual}), written against ({expected})"


# What a subclass of ours must define. One more, and none of them can be made.
ABSTRACT = {
    "workflows.runtime.types.plugin": {
        "Runtime": "get_external_adapter get_internal_adapter register run_workflow",
        "InternalRunAdapter": "get_now run_id send_event wait_receive write_to_event_stream",
        "ExternalRunAdapter": "get_result run_id send_event stream_published_events",
        "SnapshottableAdapter": "init_state replay",
        "V2RuntimeCompatibilityShim": "abort get_result_or_none is_running",
    },
}


@pytest.mark.parametrize(("module", "path", "expected"), flat(ABSTRACT))
def test_subclasses_define_what_is_asked_of_them(module, path, expected):
    moved = set(find(module, path).__abstractmethods__) ^ set(expected.split())
    assert not moved, f"upstream changed what a {path} must define: {sorted(moved)}"


# Fields that the runtime reads or sets. There may be others: they have defaults, or ours could not be made.
FIELDS = {
    "workflows.runtime.types.ticks": {
        "TickAddEvent": "event step_id origin_namespace recovery_counts scope_path emission stamped_at work_item_id",
        "TickStepResult": "step_id worker_id invocation_namespace event result stamped_at invocation_id sends",
        "TickTimeout": "timeout stamped_at",
        "TickWaiterTimeout": "step_id waiter_id invocation_namespace stamped_at",
        "TickWakeup": "due stamped_at",
        "TickSessionStart": "stamped_at",
    },
    "workflows.runtime.types.commands": {
        "CommandRunWorker": "step_id event id invocation_id invocation_namespace bound_events",
        "CommandQueueEvent": "event step_id origin_namespace recovery_counts scope_path emission",
        "CommandPublishEvent": "event",
        "CommandCompleteRun": "result",
        "CommandFailWorkflow": "exception",
        "CommandHalt": "exception",
        "CommandScheduleWaiterTimeout": "step_id waiter_id timeout invocation_namespace",
        "CommandScheduleTimeout": "timeout at_time",
        "CommandScheduleWakeup": "at_time",
    },
    "workflows.runtime.types.results": {
        "AddWaiter": "waiter_id event_type requirements timeout waiter_event",
        "DeleteWaiter": "waiter_id",
        "EmissionKey": "invocation_id index",
        "RetryAttempt": "retry_number first_attempt_at last_exception last_failed_at recovery_counts",
        "RetryDecision": "delay",
        "Returns": "return_values",
        "SentEvent": "index event step_id recovery_counts",
        "StepSends": "entries closed",
        "StepWorkerContext": "event state returns retry sends",
        "StepWorkerFailed": "exception failed_at retry_decision first_attempt_at",
        "StepWorkerResult": "result fanned_out",
        "StepWorkerState": "step_name collection_release_payload collected_events collected_waiters invocation_id",
        "StepWorkerWaiter": "waiter_id waiting_for_event requirements has_requirements resolved_event timed_out "
        "work_item_id",
        "CollectionReleasePayload": "events",
    },
    "workflows.runtime.types.internal_state": {
        "BrokerConfig": "steps",
        "BrokerState": "is_running config workers children elapsed_alive deliveries",
        "InternalStepConfig": "accepted_events accept_event_subclasses retry_policy",
        "InternalStepWorkerState": "queue config in_progress collected_events collected_waiters",
        "InProgressState": "event attempts first_attempt_at last_exception last_failed_at recovery_counts "
        "shared_state invocation_id work_item_id",
    },
    "workflows.context.context_types": {"SerializedContext": "state is_running workers deliveries"},
    "workflows.decorators": {
        "StepConfig": "accepted_events event_name context_parameter resources collection_param bare_return_types",
    },
    "workflows.resource": {"ResourceDefinition": "name resource type_annotation"},
    "workflows.retry_policy": {"RetryInfo": "retry_number elapsed_seconds last_exception last_failed_at"},
    "workflows.events": {"UnhandledEvent": "event_type qualified_name step_name idle"},
    "workflows.runtime.types.step_function": {
        "SpanCancelledEvent": "reason",
        "WorkflowRunOutputEvent": "output",
        "WorkflowStepOutputEvent": "output",
    },
    "llama_index_instrumentation.events.span": {"SpanDropEvent": "span_id err_str"},
    "llama_index_instrumentation.dispatcher": {"Dispatcher": "span_handlers event_handlers propagate"},
}


@pytest.mark.parametrize(("module", "path", "expected"), flat(FIELDS))
def test_data_has_the_fields_we_use(module, path, expected):
    cls = find(module, path)
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(cls.model_fields)
    missing = set(expected.split()) - fields
    assert not missing, f"upstream moved fields of {path}: {sorted(missing)} are gone"


# Properties and methods that are overridden or called, with nothing to compare but that they are there.
MEMBERS = {
    "workflows.context.pre_context": {"PreContext": "init_snapshot is_running serialized_state serializer store"},
    "workflows.context.external_context": {"ExternalContext": "_state is_running"},
    "workflows.context.state_store": {"InMemoryStateStore": "_lock"},
    "workflows.context.serializers": {"BaseSerializer": "serialize deserialize"},
    "workflows.decorators": {"StepConfig": "is_fan_out"},
    "workflows.resource": {"_Resource": "resolve get_dependencies set_type_annotation"},
    "workflows.runtime.types.plugin": {"InternalRunAdapter": "after_tick close finalize_step get_now is_replaying"},
}


@pytest.mark.parametrize(("module", "path", "expected"), flat(MEMBERS))
def test_classes_have_the_members_we_use(module, path, expected):
    cls = find(module, path)
    missing = [name for name in expected.split() if not hasattr(cls, name)]
    assert not missing, f"upstream moved members of {path}: {missing} are gone"


def commands_and_ticks():
    unions = [
        ("workflows.runtime.types.commands", "WorkflowCommand"),
        ("workflows.runtime.types.ticks", "WorkflowTick"),
    ]
    for module, name in unions:
        union = find(module, name)
        members = typing.get_args(union)
        if typing.get_origin(union) is typing.Annotated:
            members = typing.get_args(members[0])
        yield from (member.__name__ for member in members)


def test_the_runtime_knows_every_command_and_every_tick():
    known = {name for _, name in imports(SOURCE)}
    # Ticks that upstream's own runtimes make for themselves: what they do, a run of ours does without a tick.
    unused = {"TickPublishEvent", "TickIdleRelease"}
    new = set(commands_and_ticks()) - known
    assert new == unused, f"upstream added {sorted(new - unused)}, or took away {sorted(unused - new)}"


def test_the_ticks_that_carry_a_time():
    stamped = {cls.__name__ for cls in find("workflows.runtime.types.ticks", "STAMPED_TICK_TYPES")}
    known = {"TickSessionStart", "TickAddEvent", "TickStepResult", "TickTimeout", "TickWaiterTimeout", "TickWakeup"}
    assert stamped == known, f"upstream changed STAMPED_TICK_TYPES: {sorted(stamped ^ known)}"


def a_workflow():
    from workflows import Context, Workflow, step
    from workflows.events import StartEvent, StopEvent

    class Sample(Workflow):
        @step
        async def only(self, ctx: Context, ev: StartEvent) -> StopEvent:
            return StopEvent()

    return Sample(timeout=3, verbose=True, num_concurrent_runs=2)


# Private attributes that `runtime/upstream.py` and the faces read, and what they hold for the workflow above.
ATTRIBUTES = {
    "workflow._timeout": 3,
    "workflow._num_concurrent_runs": 2,
    "workflow._verbose": True,
    "workflow._runtime_locked": False,
    "workflow._step_functions_version": 0,
    "workflow._resource_manager.resources": {},
    "workflow._dispatcher.name": "workflows.workflow",
    "workflow._runtime.__class__.__name__": "VerboseDecorator",
    "workflow._runtime._decorated.__class__.__name__": "BasicRuntime",
    "workflow._runtime._output.__name__": "print",
    "workflow.only._step_config.event_name": "ev",
    "workflow.only._step_config.context_parameter": "ctx",
    "context._face.__class__.__name__": "PreContext",
    "context._face._serializer.__class__.__name__": "JsonSerializer",
    "context._face._workflow._timeout": 3,
    "context._face._store": None,
    "context._face._init_snapshot.is_running": False,
}


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_private_attributes(path):
    from workflows import Context

    workflow = a_workflow()
    found = {"workflow": workflow, "context": Context(workflow)}[path.split(".")[0]]
    for name in path.split(".")[1:]:
        assert hasattr(found, name), f"upstream moved {name!r} of {path}"
        found = getattr(found, name)
    assert found == ATTRIBUTES[path]


def test_the_runtime_of_who_chose_none():
    assert find("workflows.runtime.types.plugin", "_current_runtime").get() is None
    basic = find("workflows.plugins", "basic_runtime")
    with basic.registering():
        assert find("workflows.runtime.types.plugin", "_current_runtime").get() is basic
