"""LLMs that say what a script tells them: no network, no thread, and nothing of asyncio or Trio in them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import anyio.lowlevel
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.llms import LLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from pydantic import PrivateAttr

Turn = str | list[ToolSelection]
"""What the LLM says next: a text, or the tools that it wants called."""
Script = Callable[[Sequence[ChatMessage]], Turn]


def call(name: str, tool_id: str | None = None, /, **arguments: Any) -> ToolSelection:
    return ToolSelection(tool_id=tool_id or f"call-{name}", tool_name=name, tool_kwargs=arguments)


def in_turn(*turns: Turn) -> Script:
    """One turn after the other, for one conversation at a time."""
    left = list(turns)
    return lambda messages: left.pop(0)


def react_call(name: str, arguments: str = "{}") -> str:
    return f"Thought: I need a tool.\nAction: {name}\nAction Input: {arguments}"


def react_answer(text: str) -> str:
    return f"Thought: I know it.\nAnswer: {text}"


class _Scripted(LLM):
    """Answers by its script, in deltas of a word where it streams. `heard` has the messages of every question."""

    _script: Script = PrivateAttr()
    _heard: list[list[ChatMessage]] = PrivateAttr(default_factory=list)

    def __init__(self, script: Script) -> None:
        super().__init__()
        self._script = script

    @property
    def heard(self) -> list[list[ChatMessage]]:
        return self._heard

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True, model_name="scripted")

    def _turn(self, messages: Sequence[ChatMessage]) -> Turn:
        self._heard.append([message.model_copy(deep=True) for message in messages])
        return self._script(messages)

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        await anyio.lowlevel.checkpoint()
        return _responses(self._turn(messages))[-1]

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> AsyncGenerator[ChatResponse, None]:
        responses = _responses(self._turn(messages))

        async def stream() -> AsyncGenerator[ChatResponse, None]:  # noqa: ASYNC900 -- it owns nothing
            for response in responses:
                await anyio.lowlevel.checkpoint()
                yield response

        return stream()

    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return _responses(self._turn(messages))[-1]

    def _no_completions(self, *args: Any, **kwargs: Any) -> CompletionResponse:
        raise NotImplementedError("a chat model")

    complete = stream_complete = stream_chat = acomplete = astream_complete = _no_completions


class ScriptedTextLLM(_Scripted):
    """For ReActAgent."""


class ScriptedLLM(_Scripted, FunctionCallingLLM):
    """For FunctionAgent."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_chat_model=True, is_function_calling_model=True, model_name="scripted")

    def _prepare_chat_with_tools(
        self, tools: Any, user_msg: Any = None, chat_history: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        return {"messages": list(chat_history or []), "tools": tools}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        return [
            call(block.tool_name, block.tool_call_id, **block.tool_kwargs)
            for block in response.message.blocks
            if isinstance(block, ToolCallBlock)
        ]


def _responses(turn: Turn) -> list[ChatResponse]:
    """The answer in growing parts; the last one is the whole of it."""
    if isinstance(turn, list):
        blocks = [
            ToolCallBlock(tool_call_id=each.tool_id, tool_name=each.tool_name, tool_kwargs=each.tool_kwargs)
            for each in turn
        ]
        return [ChatResponse(message=ChatMessage(role="assistant", blocks=blocks), delta="")]
    parts = [f"{word} " for word in turn.split(" ")]
    parts[-1] = parts[-1][:-1]
    return [
        ChatResponse(
            message=ChatMessage(role="assistant", blocks=[TextBlock(text="".join(parts[: n + 1]))]), delta=part
        )
        for n, part in enumerate(parts)
    ]
