"""Between Python values and JSON: an allow-list, and nothing imported by name."""

from __future__ import annotations

import json
import sys

import pydantic
import pytest
from workflows import Context, Workflow, step
from workflows.context import JsonSerializer
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.exceptions import BadInput
from llama_corral.services import WorkflowCodec

pytestmark = pytest.mark.promise("P11")


class Address(pydantic.BaseModel):
    city: str


class Person(pydantic.BaseModel):
    name: str
    homes: dict[str, list[Address | None]] = {}


class Begin(StartEvent):
    who: Person
    count: int = 1


class OnlyWaitedFor(Event):
    person: Person


class Strange(Event):
    value: int

    @pydantic.field_validator("value")
    @classmethod
    def _strange(cls, value: int) -> int:
        raise KeyError("a validator's own fault")


class Extra(Event):
    n: int


class State(pydantic.BaseModel):
    people: list[Person] = []


class Flow(Workflow):
    @step
    async def begin(self, ev: Begin, ctx: Context[State]) -> StopEvent:
        answer = await ctx.wait_for_event(OnlyWaitedFor)
        strange = await ctx.wait_for_event(Strange)
        return StopEvent(result=[answer, strange])


@pytest.fixture
def codec() -> WorkflowCodec:
    return WorkflowCodec(Flow())


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that must not be imported."""
    (tmp_path / "trap_module.py").write_text(
        "import builtins\nbuiltins.trapped = True\nfrom workflows.events import Event\nclass Evil(Event):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "trap_module.Evil"
    assert "trap_module" not in sys.modules
    import builtins

    assert not hasattr(builtins, "trapped")


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    "payload",
    [
        '{{"__is_pydantic": true, "qualified_name": "{name}", "value": {{}}}}',
        '{{"__is_component": true, "qualified_name": "{name}", "value": {{}}}}',
        '{{"type": "{name}", "value": {{}}}}',
        '{{"type": "{name}"}}',
    ],
)
def test_a_named_class_is_never_imported(codec, trap, payload):
    with pytest.raises(BadInput, match="does not know an event of type"):
        codec.decode_event(payload.format(name=trap))
    hidden = json.dumps({"__is_pydantic": True, "qualified_name": trap, "value": {}})
    for cls, value in (("HumanResponseEvent", {"response": json.loads(hidden)}), ("OnlyWaitedFor", json.loads(hidden))):
        try:
            event = codec.decode_event(json.dumps({"type": cls, "value": value}))
        except BadInput:
            continue
        assert isinstance(event.response, dict)


@pytest.mark.parametrize(
    "name", ["builtins.eval", "os.system", "subprocess.Popen", "Address", "Person", "State", "", "."]
)
def test_what_is_no_event_is_refused(codec, name):
    with pytest.raises(BadInput):
        codec.decode_event(json.dumps({"qualified_name": name, "value": {}}))


def test_a_context_imports_nothing(codec, trap):
    poisoned = {
        "state": {
            "state_type": "DictState",
            "state_module": "trap_module",
            "state_data": {"_data": {"x": json.dumps({"__is_pydantic": True, "qualified_name": trap, "value": {}})}},
        },
        "broker_log": [],
        "is_running": False,
    }
    for state_type, module in (("DictState", "workflows.context.state_store"), ("Evil", "trap_module")):
        poisoned["state"]["state_type"], poisoned["state"]["state_module"] = state_type, module
        try:
            codec.decode_context(json.dumps(poisoned))
        except Exception as exc:
            assert not isinstance(exc, ImportError), exc  # noqa: PT017


@pytest.mark.parametrize(
    "payload",
    [
        json.dumps({"type": "HumanResponseEvent", "value": {"response": "yes"}}),
        json.dumps({"type": "HumanResponseEvent", "value": {"_data": {"response": "yes"}}}),
        JsonSerializer().serialize(HumanResponseEvent(response="yes")),
        json.dumps({"qualified_name": "workflows.events.HumanResponseEvent", "value": {"response": "yes"}}),
        json.dumps(
            {"qualified_name": "llama_index.core.workflow.events.HumanResponseEvent", "value": {"response": "yes"}}
        ),
    ],
)
def test_the_forms_of_an_event(codec, payload):
    event = codec.decode_event(payload)
    assert isinstance(event, HumanResponseEvent)
    assert event.response == "yes"
    again = codec.decode_event(codec.canonical_event(payload))
    assert again.response == "yes"


def test_nested_types_and_classes_named_in_code_are_known(codec):
    event = OnlyWaitedFor(person=Person(name="Ada", homes={"first": [Address(city="London"), None]}))
    decoded = codec.decode_event(JsonSerializer().serialize(event))
    assert decoded == event
    assert decoded.person.homes["first"][0].city == "London"
    names = [each["name"] for each in json.loads(codec.event_types())]
    assert "OnlyWaitedFor" in names
    assert "HumanResponseEvent" in names
    assert not {"Begin", "StopEvent", "StartEvent", "Person"} & set(names)


class AskedByHelper(Event):
    n: int


class KeptByHelper(pydantic.BaseModel):
    n: int


class Helped(Workflow):
    def __init__(self, *others: Workflow) -> None:
        super().__init__()
        self.others = list(others)

    async def _ask(self, ctx: Context) -> list[AskedByHelper]:
        return [await self._wait(ctx) for _ in range(2)]

    async def _wait(self, ctx: Context) -> AskedByHelper:
        await ctx.store.set("kept", [KeptByHelper(n=n) for n in range(2)])
        return await ctx.wait_for_event(AskedByHelper)

    def unreached(self) -> Extra:
        return Extra(n=1)

    @step
    async def begin(self, ev: StartEvent, ctx: Context) -> StopEvent:
        return StopEvent(result=await self._ask(ctx))


def test_classes_named_by_methods_that_the_steps_call_are_known():
    codec = WorkflowCodec(Helped())
    assert codec.decode_event('{"type": "AskedByHelper", "value": {"n": 1}}') == AskedByHelper(n=1)
    kept = KeptByHelper(n=1)
    assert codec.serializer.deserialize(JsonSerializer().serialize(kept)) == kept
    for unknown in ("Extra", "OnlyWaitedFor"):
        with pytest.raises(BadInput):
            codec.decode_event(json.dumps({"type": unknown, "value": {}}))
    assert "OnlyWaitedFor" in WorkflowCodec(Helped(Flow())).event_types()


def test_more_types_may_be_allowed():
    with pytest.raises(BadInput):
        WorkflowCodec(Flow()).decode_event('{"type": "Extra", "value": {"n": 1}}')
    assert WorkflowCodec(Flow(), [Extra]).decode_event('{"type": "Extra", "value": {"n": 1}}') == Extra(n=1)


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    "payload",
    [
        "",
        "no JSON",
        "[]",
        "7",
        "null",
        '"text"',
        "{}",
        '{"type": 7}',
        '{"type": "OnlyWaitedFor", "value": []}',
        '{"type": "OnlyWaitedFor", "value": "x"}',
        '{"type": "OnlyWaitedFor", "value": null}',
        '{"type": "OnlyWaitedFor", "value": {"person": 7}}',
        '{"type": "Strange", "value": {"value": 1}}',
        '{"qualified_name": "x.Y"}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_malformed_events(codec, payload):
    with pytest.raises(BadInput):
        codec.decode_event(payload)


@pytest.mark.promise("P9")
@pytest.mark.parametrize("cls", ["Begin", "StopEvent", "StartEvent"])
def test_a_run_is_neither_started_nor_stopped_by_an_event(codec, cls):
    with pytest.raises(BadInput):
        codec.decode_event(json.dumps({"type": cls, "value": {"who": {"name": "Ada"}}}))


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [({}, "who"), ({"who": 7}, "who"), ({"who": {}}, "who.name"), ({"who": {"name": "A"}, "count": "many"}, "count")],
)
def test_start_arguments_that_are_refused_name_the_field(codec, arguments, named):
    with pytest.raises(BadInput, match=named) as caught:
        codec.start_event(arguments)
    assert caught.value.hint == "Begin takes: who, count (optional)"


def test_start_arguments(codec):
    start = codec.start_event({"who": {"name": "Ada"}, "count": 2})
    assert start == Begin(who=Person(name="Ada"), count=2)
    assert set(json.loads(codec.start_schema())["properties"]) >= {"who", "count"}


def test_an_unshown_input_event_is_encoded(codec):
    record = codec.encode_event(InputRequiredEvent(prefix="?"))
    assert record.type == "InputRequiredEvent"
    assert "?" in record.payload
