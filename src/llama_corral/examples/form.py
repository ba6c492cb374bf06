"""A form that is filled in by a person, one question after the other.

Every question is published as a `Question`; a `HumanResponseEvent(response="...")` answers it. After a wrong answer it
is asked again, with the reason in `problem`. The result is a `FilledForm`.

Each question is one run of the step `ask`, because a step should wait only once: an answer reaches every wait of its
step that it fits, also those that were answered before. What is known so far travels in the event `Ask`, so two forms
never meet, not even in one session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

MAX_QUANTITY = 1000


class OpenForm(StartEvent):
    """What is ordered with this form."""

    item: str = "llama"


class Question(InputRequiredEvent):
    """Asks for one field. `problem` says what was wrong with the answer before, if there was one."""

    prefix: str
    field: str
    problem: str | None = None


class Ask(Event):
    """The next question: a field by its number, what is known so far, and what was wrong with the last answer."""

    number: int
    known: dict[str, Any]
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
    if not answer.isdecimal() or len(answer) > 9 or not 1 <= int(answer) <= MAX_QUANTITY:
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
    async def begin(self, ev: OpenForm) -> Ask:
        return Ask(number=0, known={"item": ev.item})

    @step
    async def ask(self, ctx: Context, ev: Ask) -> Ask | FilledForm:
        field = FIELDS[ev.number]
        question = Question(prefix=field.prompt.format(**ev.known), field=field.name, problem=ev.problem)
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=question, timeout=None)
        # When the answer comes the step runs again from its beginning, and this time it gets here.
        try:
            value = field.parse(str(answer.get("response", "")).strip())
        except ValueError as error:
            return Ask(number=ev.number, known=ev.known, problem=str(error))
        known = {**ev.known, field.name: value}
        if ev.number + 1 < len(FIELDS):
            return Ask(number=ev.number + 1, known=known)
        return FilledForm(**known)


form = FormWorkflow()
