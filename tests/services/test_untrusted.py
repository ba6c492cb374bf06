"""Nothing from outside is imported, unpickled or made an instance of what the workflow does not name."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle  # noqa: TID251 - to be poisoned
import sys
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import pydantic
import pytest
from typing_extensions import TypedDict
from workflows import Context, Workflow, step
from workflows.decorators import catch_error
from workflows.events import Event, SerializableEvent, StartEvent, StepFailedEvent, StopEvent

import llama_corral
from llama_corral.exceptions import BadInput
from llama_corral.protocol.records import StoredContext
from llama_corral.services import WorkflowCodec

from .flows import Chain, WaitsFor
from .rig import Probe, take_away, until
from .test_context import stored

pytestmark = pytest.mark.promise("P11")

T = TypeVar("T")


class Leaf(pydantic.BaseModel):
    n: int = 0


class InList(Leaf):
    pass


class InDict(Leaf):
    pass


class Optional(Leaf):
    pass


class InUnion(Leaf):
    pass


class OtherInUnion(Leaf):
    pass


class InTuple(Leaf):
    pass


class InGeneric(Leaf):
    pass


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    owner: InDict | None = None


class InDataclass(Leaf):
    pass


class InPydanticDataclass(Leaf):
    pass


class InTypedDict(Leaf):
    pass


class InNamedTuple(Leaf):
    pass


class InRoot(Leaf):
    pass


@dataclasses.dataclass
class Plain:
    leaf: InDataclass


@pydantic.dataclasses.dataclass
class Checked:
    leaf: InPydanticDataclass


class Dictionary(TypedDict, total=False):
    leaf: InTypedDict


class Pair(NamedTuple):
    leaf: InNamedTuple
    n: int


class Roots(pydantic.RootModel[list[InRoot]]):
    pass


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Tree(pydantic.BaseModel):
    children: list[Tree] = []
    leaf: Leaf | None = None


class Everything(Event):
    listed: list[InList]
    dictionary: dict[str, list[InDict]]
    maybe: Optional | None = None
    either: InUnion | list[OtherInUnion] | int = 0
    several: tuple[InTuple, ...] = ()
    page: Page[InGeneric] | None = None
    pet: Annotated[Cat | Dog, pydantic.Field(discriminator="kind")] = Cat()
    plain: Plain | None = None
    checked: Checked | None = None
    typed: Dictionary | None = None
    pair: Pair | None = None
    roots: Roots | None = None
    tree: Tree | None = None


class Knows(Workflow):
    @step
    async def begin(self, ev: StartEvent, ctx: Context) -> StopEvent:
        return StopEvent(result=await ctx.wait_for_event(Everything))


NESTED = [InList, InDict, Optional, InUnion, OtherInUnion, InTuple, InGeneric, Cat, Dog, InDataclass]
NESTED += [InPydanticDataclass, InTypedDict, InNamedTuple, InRoot, Leaf, Tree, Roots, Page[InGeneric]]


@pytest.mark.parametrize("cls", NESTED, ids=lambda cls: cls.__name__)
def test_nested_types_may_be_kept_on_their_own(cls):
    codec = WorkflowCodec(Knows())
    value = cls(items=[]) if issubclass(cls, Page) else cls([]) if cls is Roots else cls()
    assert codec.serializer.deserialize(codec.serializer.serialize({"kept": [value]})) == {"kept": [value]}


def test_a_named_alias_that_names_itself(monkeypatch):
    class Alias:
        pass

    alias: Any = Alias()
    alias.__value__ = dict[str, list[InList]] | None
    from llama_corral.services.allow_list import _classes_in

    assert InList in _classes_in(list[int] | dict[str, InList])
    assert InList in _classes_in(alias)
    alias.__value__ = alias
    assert _classes_in(alias) == []


class Stranger(pydantic.BaseModel):
    n: int = 0


STRANGE = json.dumps({"__is_pydantic": True, "value": {"n": 1}, "qualified_name": f"{__name__}.Stranger"})
TRAP = json.dumps({"__is_pydantic": True, "value": {}, "qualified_name": "trap_module.Evil"})


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that must not be imported."""
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.anyio
@pytest.mark.parametrize("value", [STRANGE, TRAP], ids=["not allowed", "not imported"])
async def test_a_context_with_a_type_that_is_not_allowed_is_refused(rig, trap, value):
    class Reads(Workflow):
        @step
        async def read(self, ev: StartEvent, ctx: Context) -> StopEvent:
            return StopEvent(result=str(await ctx.store.get("kept", default=None)))

    class Tampering:
        def __getattr__(self, name):
            return getattr(rig.plane, name)

        async def claim(self, *args):
            claim = await rig.plane.claim(*args)
            context = json.loads(good.payload)
            context["state"]["state_data"]["_data"]["kept"] = value
            return dataclasses.replace(claim, context=StoredContext(1, json.dumps(context), good.fingerprint))

    codec = WorkflowCodec(Reads())
    service = await rig.serve(Reads())
    await rig.plane.sessions.create("s")
    await rig.run(session="s")
    good = await stored(rig, "s")
    await rig.stop(service)
    service = await rig.serve(Reads(), coordinator=Tampering())
    service.reserve = lambda: None
    record = await rig.run(session="s")
    assert (record.status, record.error.type) == ("failed", "workflow_changed")
    assert "is refused" in record.error.message
    assert "types=[...]" in record.error.message
    await rig.stop(service)
    if value is STRANGE:
        service = await rig.serve(Reads(), coordinator=Tampering(), types=[Stranger])
        service.reserve = lambda: None
        assert (await rig.run(session="s")).result == '"n=1"'
    assert codec.event_types()


# No pickle


def test_nothing_of_ours_imports_what_runs_code_from_data():
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "jsonpickle", "joblib"}
    for path in Path(llama_corral.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                names = ["pickle"]
            found = {name.partition(".")[0] for name in names} & forbidden
            assert not found, f"{path}: {found}"
            assert not {"PickleSerializer", "JsonPickleSerializer"} & set(names), path


class Unpickled:
    def __init__(self):
        raise AssertionError("made")


@pytest.fixture
def poison(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("loads", "load", "dumps", "dump", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)


@pytest.mark.anyio
async def test_no_path_of_a_task_unpickles(rig, poison):
    """Start, events, waiting, a loss, a hand-back, leaving memory, a context, a result, a failure."""

    class Fails(Workflow):
        @step
        async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
            raise ValueError("no such llama")

    probe = Probe()
    service = await rig.serve(WaitsFor(), idle_timeout=0.01)
    await rig.serve(Chain(probe), "chain", checkpoints="every_step")
    await rig.serve(Fails(), "fails")
    await rig.plane.sessions.create("s")
    task_id = await rig.submit(times=2, session="s")

    async def is_outside() -> bool:
        return (await rig.plane.get_task(task_id)).owner is None and not service.executions

    await until(is_outside)
    await rig.answer(task_id, "a")
    await rig.wait_status(task_id, "waiting")
    await take_away(rig, service)
    await rig.stop(service)
    await rig.serve(WaitsFor())
    await rig.answer(task_id, "b")
    assert (await rig.result(task_id)).result == '["a","b"]'
    chain = await rig.submit("chain")
    await probe.wait_entered(1)
    probe.open("all")
    assert (await rig.result(chain)).status == "completed"
    assert (await rig.run("fails")).error.type == "ValueError"


@pytest.mark.anyio
async def test_an_exception_of_a_retried_step_is_not_imported(rig, trap):
    """A snapshot names the class of what a step raised."""
    from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

    class Tries(Workflow):
        @step(retry_policy=retry_policy(wait=wait_fixed(0.3), stop=stop_after_attempt(3)))
        async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
            if ctx.retry_info().retry_number == 0:
                raise error("first")
            return StopEvent(result=type(ctx.retry_info().last_exception).__name__)

    class Ours(Exception):
        pass

    Ours.__module__ = "trap_module"
    Ours.__qualname__ = "Evil"
    error = Ours
    service = await rig.serve(Tries(), drain_timeout=0)
    task_id = await rig.submit()
    await until(lambda: task_id in service.executions and service.executions[task_id].idle)
    await rig.stop(service)
    await rig.serve(Tries())
    assert (await rig.result(task_id)).result == '"UnreconstructedException"'


class Wrapped(StartEvent):
    inner: SerializableEvent | None = None


class CatchesErrors(Workflow):
    @step
    async def work(self, ev: Wrapped) -> StopEvent:
        raise ValueError

    @catch_error
    async def recover(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent()


def test_events_inside_of_events_are_not_imported_either():
    """Upstream's fields for events and exceptions look up the name that they are given, and import its module."""
    codec = WorkflowCodec(CatchesErrors())
    inner = {"__is_pydantic": True, "qualified_name": "wave.Wave_read", "value": {}}
    failed = {"step_name": "work", "attempts": 1, "elapsed_seconds": 1.0, "failed_at": "2024-01-01T00:00:00Z"}
    failed |= {"input_event": inner, "exception": {"exception_type": "wave.Error", "exception_message": ""}}
    sys.modules.pop("wave", None)
    with pytest.raises(BadInput):
        codec.start_event({"inner": inner})
    with pytest.raises(BadInput):
        codec.decode_event(json.dumps({"type": "StepFailedEvent", "value": failed}))
    assert "wave" not in sys.modules
