"""Calls that a test lets fail by name: what `FaultyStore` and `FaultyCoordinator` have in common."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeVar

import anyio

from ..exceptions import CorralError, Unavailable

T = TypeVar("T")
When = Literal["before", "after"]


class CallFaultKind(StrEnum):
    REFUSE = "refuse"
    LOSE_ANSWER = "lose_answer"
    DUPLICATE = "duplicate"
    DELAY = "delay"


@dataclass(eq=False, slots=True)
class CallFault:
    """A planned fault. `applied` counts how often it struck; `stop()` ends it."""

    kind: CallFaultKind
    method: str | None
    skip: int
    times: float
    applied: int = 0

    def strikes(self) -> bool:
        """Whether a call of its method is struck; counts it."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.applied >= self.times:
            return False
        self.applied += 1
        return True

    def stop(self) -> None:
        self.times = 0


@dataclass(eq=False, slots=True)
class HungCall:
    """Calls that do not return: `await hung.reached.wait()` until somebody is caught; `caught` counts them."""

    method: str | None
    when: When
    caught: int = 0
    reached: anyio.Event = field(default_factory=anyio.Event)
    released: anyio.Event = field(default_factory=anyio.Event)


@dataclass(frozen=True, slots=True)
class _Chances:
    random: random.Random
    methods: Collection[str]
    weights: dict[CallFaultKind, float]


class CallFaults:
    """Passes every call on until a test plans a fault. Without `method`, a fault strikes any call of `methods`.

    Planned faults are tried in the order in which they were planned, before those by chance; the first that strikes counts.
    """

    def __init__(self, methods: Collection[str], error: type[Unavailable]) -> None:
        self.held: list[Callable[[], Awaitable[object]]] = []
        """Delayed calls, until `deliver_held`."""
        self._methods = methods
        self._error = error
        self._planned: list[CallFault] = []
        self._hung: list[HungCall] = []
        self._chances: _Chances | None = None
        self._struck: dict[str, int] = {}

    # What a test plans

    def refuse(self, method: str | None = None, *, nth: int = 1, times: float = 1) -> CallFault:
        """The nth call from now (and those after it, `times` in all) is not done, and raises."""
        return self._plan(CallFaultKind.REFUSE, method, nth, times)

    def lose_answer(self, method: str | None = None, *, nth: int = 1, times: float = 1) -> CallFault:
        """Done; raises all the same."""
        return self._plan(CallFaultKind.LOSE_ANSWER, method, nth, times)

    def duplicate(self, method: str | None = None, *, nth: int = 1, times: float = 1) -> CallFault:
        """Done twice; the second answer is given."""
        return self._plan(CallFaultKind.DUPLICATE, method, nth, times)

    def delay(self, method: str | None = None, *, nth: int = 1, times: float = 1) -> CallFault:
        """Raises, and is done when a test calls `deliver_held`: a request that was stuck on its way."""
        return self._plan(CallFaultKind.DELAY, method, nth, times)

    async def deliver_held(self) -> list[object]:
        """Do the delayed calls, in their order. Their answers and errors reach nobody else; they are returned here."""
        going, self.held = self.held, []
        answers: list[object] = []
        for act in going:
            try:
                answers.append(await act())
            except CorralError as error:
                answers.append(error)
        return answers

    @contextmanager
    def hang(self, method: str | None = None, *, when: When = "before") -> Iterator[HungCall]:
        """Within the block such calls do not return: before they are done, or after. Those caught go on afterwards."""
        hung = HungCall(method, when)
        self._hung.append(hung)
        try:
            yield hung
        finally:
            self._hung.remove(hung)
            hung.released.set()

    def at_random(
        self,
        seed: int,
        methods: Collection[str] | None = None,
        *,
        refuse: float = 0.0,
        lose_answer: float = 0.0,
        duplicate: float = 0.0,
        delay: float = 0.0,
    ) -> None:
        """Let each call of these methods be struck with these probabilities, the same for the same seed and calls."""
        weights = {
            CallFaultKind.REFUSE: refuse,
            CallFaultKind.LOSE_ANSWER: lose_answer,
            CallFaultKind.DUPLICATE: duplicate,
            CallFaultKind.DELAY: delay,
        }
        self._chances = _Chances(random.Random(seed), self._methods if methods is None else methods, weights)

    def heal(self) -> None:
        """No faults any more. Delayed calls stay in `held`."""
        for fault in self._planned:
            fault.stop()
        self._chances = None

    def fault_statistics(self) -> dict[str, int]:
        """How often each kind struck, as `{"refuse report": 2}`."""
        return dict(self._struck)

    # How faults strike

    def _plan(self, kind: CallFaultKind, method: str | None, nth: int, times: float) -> CallFault:
        fault = CallFault(kind, method, nth - 1, times)
        self._planned.append(fault)
        return fault

    def _strike(self, method: str) -> CallFaultKind | None:
        kind = next((each.kind for each in self._planned if self._fits(each.method, method) and each.strikes()), None)
        if kind is None:
            kind = self._by_chance(method)
        if kind is not None:
            name = f"{kind.value} {method}"
            self._struck[name] = self._struck.get(name, 0) + 1
        return kind

    def _fits(self, planned: str | None, method: str) -> bool:
        return method in self._methods if planned is None else planned == method

    def _by_chance(self, method: str) -> CallFaultKind | None:
        chances = self._chances
        if chances is None or method not in chances.methods:
            return None
        draw = chances.random.random()
        for kind, weight in chances.weights.items():
            draw -= weight
            if draw < 0:
                return kind
        return None

    async def _call(self, method: str, act: Callable[[], Awaitable[T]]) -> T:
        """One call, with whatever is planned for it."""
        await self._hang_at(method, "before")
        kind = self._strike(method)
        if kind is CallFaultKind.REFUSE:
            raise self._error(f"Refused by a planned fault: {method}")
        if kind is CallFaultKind.DELAY:
            self.held.append(act)
            raise self._error(f"Delayed by a planned fault: {method}")
        lost = self._error(f"The answer was lost by a planned fault: {method}")
        try:
            answer = await act()
            if kind is CallFaultKind.DUPLICATE:
                answer = await act()
        except CorralError as error:
            if kind is CallFaultKind.LOSE_ANSWER:
                raise lost from error
            raise
        await self._hang_at(method, "after")
        if kind is CallFaultKind.LOSE_ANSWER:
            raise lost
        return answer

    async def _hang_at(self, method: str, when: When) -> None:
        for hung in tuple(self._hung):
            if hung.when == when and self._fits(hung.method, method):
                hung.caught += 1
                hung.reached.set()
                await hung.released.wait()
