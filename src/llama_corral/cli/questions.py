"""Asking the person at the terminal what a workflow wants to know."""

from __future__ import annotations

import os
import sys
from collections import deque
from typing import Final

import anyio
import anyio.to_thread

from ..client import Task, TaskEvent
from ..exceptions import BadInput, Conflict, CorralError
from ..protocol.lifecycle import TaskStatus
from .output import note, one_line

ANSWER: Final = "HumanResponseEvent"
_PROMPTS: Final = ("prefix", "prompt", "question", "msg", "message")
_FIRST_LOOK: Final = 1.0
_LAST_LOOK: Final = 30.0


class LineReader:
    """Lines of standard input, read in a worker thread that a cancellation leaves behind.

    It reads the descriptor itself: a thread inside `sys.stdin` holds a lock that the interpreter wants when it exits.
    """

    def __init__(self, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._lines: deque[str] = deque()
        self._rest = b""
        self._ended = False

    async def line(self) -> str | None:
        """The next line without its end; None at the end of the input."""
        while not self._lines:
            if self._ended:
                return None
            await self._read()
        return self._lines.popleft()

    async def _read(self) -> None:
        try:
            data = await anyio.to_thread.run_sync(os.read, self._descriptor, 65536, abandon_on_cancel=True)
        except OSError:  # closed, or a terminal that has hung up
            data = b""
        self._ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._ended and self._rest:
            lines.append(self._rest)
            self._rest = b""
        self._lines.extend(line.decode("utf-8", "replace").removesuffix("\r") for line in lines)


class Questions:
    """Finds out when a workflow waits for a person, and sends what the person says.

    An event asks if its type says so, or if it holds a prompt as upstream's `InputRequiredEvent` does by convention. The
    wire does not tell what other events derive from it; so after a silence at a terminal the task is looked at once, and
    if it waits the person may answer too. Answering early or needlessly does no harm: events are held until somebody
    asks.
    """

    def __init__(self, task: Task, reader: LineReader) -> None:
        self._task = task
        self._reader = reader
        self._prompts: deque[str] = deque()
        self._news = anyio.Event()
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    def saw(self, event: TaskEvent) -> None:
        """Every event of the task, in order."""
        prompt = prompt_of(event)
        if prompt is not None:
            self._prompts.append(prompt)
        self._news.set()

    async def answer_all(self) -> None:
        """Ask and send until the input or the task ends."""
        while True:
            prompt = await self._next_prompt()
            sys.stderr.write(f"{prompt} ")
            sys.stderr.flush()
            answer = await self._reader.line()
            if answer is None:
                sys.stderr.write("\n")
                note(f"no more input; answer with: corral send {self._task.id} {ANSWER} -a response=...")
                return
            try:
                await self._task.send_event(ANSWER, {"response": answer})
            except Conflict:
                return  # it has ended meanwhile
            except BadInput as error:
                note(f"corral: {error}; send what it wants with: corral send {self._task.id} EVENT -a key=value")

    async def _next_prompt(self) -> str:
        look = _FIRST_LOOK
        while not self._prompts:
            self._news = anyio.Event()
            with anyio.move_on_after(look if self._interactive else None):
                await self._news.wait()
                look = _FIRST_LOOK
                continue
            if await self._waits():
                return "The workflow waits. Answer:"
            look = min(2 * look, _LAST_LOOK)
        return self._prompts.popleft()

    async def _waits(self) -> bool:
        try:
            return (await self._task.status()).status is TaskStatus.WAITING
        except CorralError:
            return False  # the event stream will say what is wrong, if it lasts


def prompt_of(event: TaskEvent) -> str | None:
    """What an event asks; None if it asks nothing."""
    asks = event.type.rpartition(".")[2].endswith("InputRequiredEvent")
    for name in _PROMPTS if asks else _PROMPTS[:2]:
        text = event.data.get(name)
        if isinstance(text, str) and text.strip():
            return one_line(text)
    return f"{event.type}:" if asks else None
