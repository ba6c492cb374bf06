"""Which types may come from the wire for a workflow: collected when it is registered, and never looked up by name (P11).

The list: the events of the step signatures, the state type, classes that the code of the steps names (so that an event
which is only waited for is known), their nested pydantic types, upstream's own events, and what the service's owner adds.

The code of a step goes on where it calls a method of the workflow. llama-index-core's agents are workflows that keep nearly
everything there, and in two more places: in the agents that an AgentWorkflow holds, and in the functions of their tools.
From that code come their memory, messages and reasoning steps, and what a tool waits for.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, TypeGuard, get_args, get_type_hints

import pydantic
from workflows import Workflow
from workflows.events import HumanResponseEvent

from ..runtime import workflow_state_type, workflow_step_functions


def collect_types(workflow: Workflow, more: Iterable[type[Any]] = ()) -> list[type[Any]]:
    """The allow-list of a workflow, in a stable order, nested pydantic types included."""
    found: dict[type[Any], None] = {}
    seen: set[type[Any]] = set()
    pending: list[Any] = [HumanResponseEvent, *workflow.events, workflow_state_type(workflow), *more]
    workflows = list(_with_held(workflow))
    for function in _reached_functions(workflows):
        pending.extend(_classes_named_in(function))
    for each in workflows:
        pending.extend(_types_of_values(vars(each).get("initial_state")))
    while pending:
        cls = pending.pop(0)
        if not isinstance(cls, type) or cls in seen:
            continue
        seen.add(cls)
        if _may_travel(cls):
            found[cls] = None
            for field in cls.model_fields.values():
                pending.extend(_classes_in(field.annotation))
        elif _has_fields(cls):  # it is dumped as a part of a model, and what it holds may be kept on its own
            pending.extend(member for hint in _hints(cls).values() for member in _classes_in(hint))
    return list(found)


def _may_travel(cls: type[Any]) -> TypeGuard[type[pydantic.BaseModel]]:
    # Agents are pydantic models too, and their own code names them. They are what runs, not what is told.
    if not issubclass(cls, pydantic.BaseModel):
        return False
    return cls is not pydantic.BaseModel and not issubclass(cls, Workflow)


def _has_fields(cls: type[Any]) -> bool:
    # Not typing.is_typeddict: until Python 3.12 pydantic wants those of typing_extensions, which it does not know.
    is_typed_dict = issubclass(cls, dict) and hasattr(cls, "__required_keys__")
    return dataclasses.is_dataclass(cls) or is_typed_dict or (issubclass(cls, tuple) and hasattr(cls, "_fields"))


def _hints(cls: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except Exception:  # a name that is not there at run time; its owner may add the type
        return {}


def _with_held(workflow: Workflow) -> Iterator[Workflow]:
    """The workflow and those that it keeps in an attribute, alone or in a list or dict."""
    seen: dict[int, Workflow] = {}
    pending = [workflow]
    while pending:
        each = pending.pop(0)
        if id(each) in seen:
            continue
        seen[id(each)] = each
        yield each
        for value in vars(each).values():
            members = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            pending.extend(member for member in members if isinstance(member, Workflow))


def _reached_functions(workflows: list[Workflow]) -> Iterator[FunctionType]:
    """The steps, the functions of tools, and the methods of any of the workflows that those name, and so on."""
    classes = [type(workflow) for workflow in workflows]
    seen: set[FunctionType] = set()
    pending = [function for workflow in workflows for function in _entries(workflow)]
    while pending:
        function = _plain(pending.pop(0))
        if function is None or function in seen:
            continue
        seen.add(function)
        yield function
        for name in _names_in(function.__code__):
            pending.extend(inspect.getattr_static(cls, name, None) for cls in classes)


def _entries(workflow: Workflow) -> list[Any]:
    tools = vars(workflow).get("tools") or ()
    return [*workflow_step_functions(workflow).values(), *(getattr(tool, "real_fn", None) for tool in tools)]


def _plain(function: Any) -> FunctionType | None:
    """The function behind a method or a decorator; None for what has no code of its author's to look at."""
    function = getattr(function, "__func__", function)
    function = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType) or function.__module__.partition(".")[0] in ("workflows", "pydantic"):
        return None
    return function


def _names_in(code: CodeType) -> Iterator[str]:
    """Every global and attribute that the code names, with that of comprehensions and inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _classes_named_in(function: FunctionType) -> list[type[Any]]:
    """Pydantic classes that a function refers to by name, in its globals or its closure."""
    values = [function.__globals__.get(name) for name in sorted(set(_names_in(function.__code__)))]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not yet assigned
            continue
    return [value for value in values if isinstance(value, type) and issubclass(value, pydantic.BaseModel)]


def _types_of_values(value: Any) -> list[type[Any]]:
    if isinstance(value, dict):
        return [cls for item in value.values() for cls in _types_of_values(item)]
    if isinstance(value, (list, tuple)):
        return [cls for item in value for cls in _types_of_values(item)]
    return [type(value)]


def _classes_in(annotation: Any) -> list[type[Any]]:
    """The classes of an annotation: of its arguments, and of what a named alias (which may name itself) stands for."""
    found: list[type[Any]] = []
    aliases: set[int] = set()
    pending = [annotation]
    while pending:
        part = pending.pop(0)
        arguments = get_args(part)
        if isinstance(part, type) and not arguments:
            found.append(part)
            continue
        pending.extend(arguments)
        if hasattr(part, "__value__") and id(part) not in aliases:
            aliases.add(id(part))
            pending.append(part.__value__)
    return found
