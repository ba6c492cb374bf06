"""How many tasks may wait for a service. Pure; one event loop."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

RECOUNT_AFTER: Final = 1.0
"""Seconds after a refusal for which a full service is not counted again."""
PART: Final = 4
"""What is missing to the limit, divided by this, is one budget of one of several control planes."""
MAX_SERVICES: Final = 1_000


@dataclass(slots=True)
class _Budget:
    left: int = 0
    closed_until: float = float("-inf")


class Admission:
    """A limit on the waiting tasks of each service, without a count for each task.

    A count gives a budget: what is missing to the limit. Accepted tasks use it up; then it is counted again, and a new
    budget is given if it is a twentieth of the limit at least, else everything is refused until the next count, a second
    later at the earliest. So a count, which costs as much as there are waiting tasks, comes once in limit / 20 tasks, or
    once a second: O(1) a task. Tasks that start at once use the budget up too, which only means a count more.

    Tasks that come back by themselves (lost workers, retries) are never refused. Each control plane on a store has budgets
    of its own: where there may be others, a budget is a part of what is missing only, so that together they accept little
    more than the limit.

    Args:
        limit: Tasks of one service that may wait; 0: any number.
        alone: There are no other control planes on the store.
    """

    def __init__(self, limit: int, *, alone: bool = True) -> None:
        self.limit = limit
        self._part = 1 if alone else PART
        self._portion = max(1, limit // 20)
        # The least recently used one is forgotten first; that costs a count when its service comes back.
        self._budgets: OrderedDict[str, _Budget] = OrderedDict()

    def take(self, service_name: str) -> bool:
        """Whether one more task is within the budget, which is one smaller then. False: see `may_count`."""
        if not self.limit:
            return True
        budget = self._find(service_name)
        if budget.left:
            budget.left -= 1
            return True
        return False

    def may_count(self, service_name: str, now: float) -> bool:
        """Whether a count could change anything: False for a while after a refusal. `now` is monotonic."""
        return now >= self._find(service_name).closed_until

    def counted(self, service_name: str, waiting: int, now: float) -> bool:
        """Take a count in, and one task as `take` does."""
        budget = self._find(service_name)
        room = self.limit - waiting
        if room < self._portion:
            budget.closed_until = now + RECOUNT_AFTER
            return False
        budget.left = max(self._portion, room // self._part) - 1
        return True

    def _find(self, service_name: str) -> _Budget:
        budget = self._budgets.get(service_name)
        if budget is None:
            budget = self._budgets[service_name] = _Budget()
            if len(self._budgets) > MAX_SERVICES:
                self._budgets.popitem(last=False)
        else:
            self._budgets.move_to_end(service_name)
        return budget
