"""A form that is filled in by a person, one question after the other.

Every question is published as a `Question`; a `HumanResponseEvent(response="...")` answers it. After a wrong answer it
is asked again, with the reason in `problem`. The result is a `FilledForm`.

A step that waits is run from its beginning again when the answer comes, and the answers so far are given to it at
once. So there is nothing to remember between two questions: the step reads like a conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workflows import Context, Workflow, step
from workflows.events import HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

MAX_QUANTITY = 1000


class OpenForm(StartEvent):
    """What is ordered with this form."""

    item: str = "llama"


class Question(InputRequiredEvent):
    """Asks for one field. `problem` says what was wrong with the answer before, if there was one."""

    prefix: str
    field: str
    problem: str | None = None


class FilledForm(StopEvent):
    """The form as it was filled in. `confirmed` is the answer to the last question."""

    item: str
    name: str
    quantity: int
    confirmed: bool

    def __str__(self) -> str:
        state = "confirmed" if self.confirmed else "not confirmed"
        return f"{self.quantity} x {self.item} for {self.name} ({state})"


@dataclass(frozen=True)
class Field:
    """A field of the form: its name, its question, and how an answer becomes a value (ValueError: ask again)."""

    name: str
    prompt: str
    parse: Callable[[str], Any]


def parse_name(answer: str) -> str:
    if not answer:
        raise ValueError("a name has at least one letter")
    return answer


def parse_quantity(answer: str) -> int:
    if not answer.isdecimal() or not 1 <= int(answer[:9]) <= MAX_QUANTITY:
        raise ValueError(f"{answer[:40]!r} is not a whole number from 1 to {MAX_QUANTITY}")
    return int(answer)


def parse_yes_no(answer: str) -> bool:
    try:
        return {"yes": True, "y": True, "no": False, "n": False}[answer.lower()]
    except KeyError:
        raise ValueError("please answer yes or no") from None


FIELDS = (
    Field("name", "What is your name?", parse_name),
    Field("quantity", "How many {item}s would you like?", parse_quantity),
    Field("confirmed", "Order {quantity} x {item} for {name}?", parse_yes_no),
)


class FormWorkflow(Workflow):
    """Takes `item`, asks for name, quantity and a confirmation, answers with a `FilledForm`."""

    def __init__(self) -> None:
        super().__init__(timeout=None)  # a person may take longer than any timeout

    @step
    async def fill_in(self, ctx: Context, ev: OpenForm) -> FilledForm:
        values: dict[str, Any] = {"item": ev.item}
        for field in FIELDS:
            values[field.name] = await self._ask(ctx, field, field.prompt.format(**values))
        return FilledForm(**values)

    async def _ask(self, ctx: Context, field: Field, prompt: str) -> Any:
        problem: str | None = None
        attempt = 1
        while True:
            answer = await ctx.wait_for_event(
                HumanResponseEvent,
                waiter_event=Question(prefix=prompt, field=field.name, problem=problem),
                # One id for each time a question is asked: it tells the answers apart when the step runs again.
                waiter_id=f"{field.name}-{attempt}",
                timeout=None,
            )
            try:
                return field.parse(str(answer.get("response", "")).strip())
            except ValueError as error:
                problem = str(error)
            attempt += 1


form = FormWorkflow()
