"""What the writer does in its worker thread: gives every unit of a batch its outcome, in as few transactions as it takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ..exceptions import StoreUnavailable, UsageError
from .transaction import Connection
from .work import Work, explain

logger = logging.getLogger(__name__)

TOGETHER: Final = 2
"""How often a batch is tried as one transaction where another one is in its way; then each unit is one of its own, which
holds few locks for a short time."""
ALONE: Final = 5


class BatchLostError(Exception):
    """BEGIN or COMMIT failed, or the database undid the whole transaction: nothing of the batch is applied, unless the
    answer to its COMMIT was lost."""


class Commits:
    """Commits batches over a connection, one at a time.

    Attributes:
        redone: How many batches took more than one transaction.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.redone = 0

    def commit(self, batch: list[Work[Any]]) -> None:
        """Give every unit of the batch its outcome."""
        attempts = ALONE if len(batch) == 1 else TOGETHER
        while (lost := self._commit(batch)) is not None:
            passes = self._connection.may_pass(lost)
            self._connection.rollback()
            attempts -= 1
            if not passes or (not attempts and len(batch) == 1):
                self._fail(batch, lost)
                return
            self.redone += 1
            if not attempts:
                for work in batch:
                    self.commit([work])
                return

    def _commit(self, batch: list[Work[Any]]) -> Exception | None:
        """What has undone all of the batch, and is not undone itself; None if every unit has its outcome."""
        try:
            if len(batch) == 1:
                self._alone(batch[0])
            elif not self._together(batch):
                self.redone += 1
                self._one_by_one(batch)
        except BatchLostError as lost:
            error = lost.__cause__
            assert isinstance(error, Exception)
            return error
        return None

    def _alone(self, work: Work[Any]) -> None:
        connection = self._connection
        with _losing_the_batch():
            connection.begin((work.names,))
        try:
            result = work.run(connection.tx)
        except Exception as error:
            if connection.may_pass(error):
                raise BatchLostError from error
            connection.rollback()
            work.fail(explain(connection, error))
            return
        with _losing_the_batch():
            connection.commit()
        work.succeed(result)

    def _together(self, batch: list[Work[Any]]) -> bool:
        """All units in one transaction. False if one failed: everything is rolled back."""
        connection = self._connection
        with _losing_the_batch():
            connection.begin([work.names for work in batch])
        try:
            results = [work.run(connection.tx) for work in batch]
        except Exception as error:
            if connection.may_pass(error):
                raise BatchLostError from error
            connection.rollback()
            return False
        with _losing_the_batch():
            connection.commit()
        for work, result in zip(batch, results, strict=True):
            work.succeed(result)
        return True

    def _one_by_one(self, batch: list[Work[Any]]) -> None:
        """The same with a savepoint a unit, so that only the guilty one fails."""
        connection = self._connection
        results: list[tuple[Work[Any], Any | UsageError]] = []
        failures: list[tuple[Work[Any], Exception]] = []
        with _losing_the_batch():
            connection.begin([work.names for work in batch])
        for work in batch:
            with _losing_the_batch():
                connection.savepoint()
            try:
                result = work.run(connection.tx)
            except Exception as error:
                if connection.may_pass(error) or not connection.rollback_to_savepoint():
                    raise BatchLostError from error
                failures.append((work, explain(connection, error)))
                continue
            with _losing_the_batch():
                connection.release_savepoint()
            results.append((work, result))
        with _losing_the_batch():
            connection.commit()
        for work, result in results:
            work.succeed(result)
        for work, told in failures:
            work.fail(told)

    def _fail(self, batch: list[Work[Any]], error: Exception) -> None:
        if not isinstance(error, StoreUnavailable):  # which says that the store is away: that was logged when it went
            logger.error("A batch of %d units failed: %s", len(batch), _unavailable(self._connection, error))
        for work in batch:
            work.fail(_unavailable(self._connection, error))


def _unavailable(connection: Connection, error: Exception) -> Exception:
    """What those are told who share a transaction with somebody's error."""
    told = explain(connection, error)
    if isinstance(told, StoreUnavailable):
        return told
    lost = StoreUnavailable(f"The store undid the transaction: {error}")
    lost.__cause__ = error
    return lost


@contextmanager
def _losing_the_batch() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise BatchLostError from error
