"""Every statement of the store, defined once in Core and compiled once a dialect to the text that the cursor runs.

Executing Core costs 150-180 us a transaction and 8-22 us an operation on top (measured); its text costs nothing.
Conditions on the status of a task come from `lifecycle.sources(trigger)`, so no statement can make a change that the
table of transitions does not list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import Dialect

from .base import Logging as Logging
from .base import Taking as Taking
from .children import Children
from .lives import Lives
from .outside import Outside
from .reads import Reads
from .registry import Registry
from .shared import Shared
from .upkeep import Upkeep

DIALECTS: dict[str, Callable[[], Dialect]] = {
    "sqlite": lambda: sqlite.dialect(paramstyle="named"),
    "postgresql": lambda: postgresql.dialect(paramstyle="pyformat"),  # type: ignore[no-untyped-call]
}


@functools.cache
def statements_for(dialect: str) -> Statements:
    """The statements of a dialect, compiled at the first call (some 20 ms)."""
    return Statements(DIALECTS[dialect]())


class Statements(Registry, Lives, Children, Outside, Reads, Upkeep, Shared):
    """The statements as SQL text of one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__(dialect)
        self._define_registry()
        self._define_sessions()
        self._define_accept_and_claim()
        self._define_line()
        self._define_reports()
        self._define_release()
        self._define_children()
        self._define_unowned()
        self._define_reads()
        self._define_due()
        self._define_retention()
        self._define_dead_letters()
        if dialect.name != "sqlite":
            self._define_shared()
