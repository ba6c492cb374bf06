"""One call on its way to a thread and back: used by writer and reader alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio

from ..exceptions import StoreUnavailable, UsageError
from .transaction import NAMELESS, Connection, Names, Transaction

T = TypeVar("T")
Unit = Callable[..., T | UsageError]
"""`unit(tx, *arguments)`: what to do in a transaction. A returned `UsageError` is raised to the caller."""


def closed() -> StoreUnavailable:
    return StoreUnavailable("The store is closed.")


class Work(Generic[T]):
    """A unit with its arguments and, later, its outcome. `done` is set once there is an outcome."""

    __slots__ = ("_arguments", "_result", "_unit", "done", "error", "has_outcome", "names", "taken", "withdrawn")

    def __init__(self, unit: Unit[T], arguments: tuple[Any, ...], names: Names = NAMELESS) -> None:
        self._unit = unit
        self._arguments = arguments
        self.names = names
        self._result: T
        self.done = anyio.Event()
        self.taken = False
        self.withdrawn = False
        self.has_outcome = False
        self.error: Exception | None = None

    def run(self, tx: Transaction) -> T | UsageError:
        return self._unit(tx, *self._arguments)

    def succeed(self, result: T | UsageError) -> None:
        self.has_outcome = True
        self.error = None
        if isinstance(result, UsageError):
            self.error = result
        else:
            self._result = result

    def fail(self, error: Exception) -> None:
        self.has_outcome = True
        self.error = error

    def outcome(self) -> T:
        if self.error is None:
            return self._result
        try:
            raise self.error
        finally:
            self.error = None  # the traceback refers to this frame, and so to this object


def explain(connection: Connection, error: Exception) -> Exception:
    """What the caller of a unit is told: never the same object twice, because tracebacks collect in it."""
    told = connection.translate(error)
    if told is None:
        return error
    told.__cause__ = error
    return told


def run_alone(connection: Connection, work: Work[Any]) -> None:
    """One unit as one transaction."""
    try:
        connection.begin()
        result = work.run(connection.tx)
        connection.commit()
    except Exception as error:
        connection.rollback()
        work.fail(explain(connection, error))
    else:
        work.succeed(result)
