"""A Context as JSON: what upstream writes it writes the same way, and it forgets no conversation."""

from __future__ import annotations

import json

import pytest
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer, Memory
from llama_index.core.schema import TextNode
from pydantic import BaseModel
from workflows.context import JsonSerializer, PickleSerializer
from workflows.events import HumanResponseEvent

from llama_corral.runtime import ContextSerializer, KeptElsewhere
from llama_corral.runtime.serializer import as_context_serializer


class Plain(BaseModel):
    n: int


@pytest.mark.parametrize(
    "value",
    [
        {"x": [1, 2.5, None, "ä"]},
        Plain(n=1),
        [Plain(n=1), {"a": Plain(n=2)}],
        HumanResponseEvent(response="yes"),
        TextNode(text="a node", id_="1"),
        [TextNode(text="in a list", id_="2")],
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_same_text_as_upstreams(value):
    assert ContextSerializer().serialize(value) == JsonSerializer().serialize(value)
    assert ContextSerializer().deserialize(JsonSerializer().serialize(value)) == value


@pytest.mark.parametrize("wrap", [lambda memory: memory, lambda memory: {"kept": [memory]}], ids=["alone", "nested"])
def test_a_conversation_comes_back(wrap):
    memory = ChatMemoryBuffer.from_defaults(token_limit=77, chat_store_key="here")
    memory.put(ChatMessage(role="user", blocks=[TextBlock(text="look"), ImageBlock(image=b"\x89PNG\r\n\x1a\n")]))
    memory.put(ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_name="add", tool_kwargs={"a": 1})]))
    memory.put(ChatMessage(role="tool", content="3", additional_kwargs={"tool_call_id": "1"}))
    serializer = ContextSerializer(allowed_types=[ChatMemoryBuffer])
    text = serializer.serialize(wrap(memory))
    again = serializer.deserialize(text)
    again = again["kept"][0] if isinstance(again, dict) else again
    assert type(again) is ChatMemoryBuffer
    assert again.get_all() == memory.get_all()
    assert (again.token_limit, again.chat_store_key) == (77, "here")
    assert JsonSerializer().serialize(json.loads(text)) == text


@pytest.mark.parametrize(
    ("value", "cause"),
    [(Memory.from_defaults(session_id="a secret"), KeptElsewhere), (["a secret", object()], TypeError)],
    ids=["kept elsewhere", "not JSON"],
)
def test_what_cannot_be_written_is_said_and_not_shown(value, cause):
    with pytest.raises(ValueError, match=f"a {type(value).__name__} cannot be written as JSON") as caught:
        ContextSerializer().serialize(value)
    assert type(caught.value.__cause__) is cause
    assert "a secret" not in str(caught.value)


@pytest.mark.promise("P11")
def test_ours_takes_the_place_of_upstreams_own_alone():
    strict = as_context_serializer(JsonSerializer(allowed_types=[Plain]))
    assert type(strict) is ContextSerializer
    assert strict.deserialize(strict.serialize(Plain(n=1))) == Plain(n=1)
    with pytest.raises(ValueError, match="not in the serializer's allowed types"):
        strict.deserialize(JsonSerializer().serialize(TextNode(text="x")))
    chosen = PickleSerializer()
    assert as_context_serializer(chosen) is chosen
    assert as_context_serializer(strict) is strict
