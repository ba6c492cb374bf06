"""What keeps the store small: retention, and the bounded list of messages that nobody can use. The rules of
`accept_units` hold here too."""

from __future__ import annotations

from typing import Final

from ..protocol.records import DeadLetter
from .endings import forget_epochs
from .transaction import Row, Transaction

DEAD_LETTERS: Final = 10_000
"""The most that are kept; of more, the oldest go."""
ROWS_A_TASK: Final = 10
"""A batch of tasks has so many events for each, on average, or is cut short: the writer is not to be kept long."""


def purge(tx: Transaction, before: float, limit: int) -> int:
    ended = _few_rows(tx.take(tx.sql.ended_before, {"before": before}, limit, wait=False), limit * ROWS_A_TASK)
    everything = [{"task_no": row[0]} for row in ended]
    # The counters of a row say what it has; keys alone find it.
    for statement, counter in (
        (tx.sql.delete_events, 1),
        (tx.sql.delete_inbox, 2),
        (tx.sql.delete_checkpoint, 3),
    ):
        keys = [{"task_no": row[0]} for row in ended if row[counter]]
        if keys:
            tx.run_many(statement, keys)
    if everything:
        tx.run_many(tx.sql.delete_task, everything)
        forget_epochs(tx, max((epoch for *_, epoch, digest in ended if digest is not None), default=0))
    letters = tx.take(tx.sql.dead_letters_before, {"before": before}, limit - len(ended), wait=False)
    if letters:
        tx.run_many(tx.sql.delete_dead_letter, [{"no": no} for (no,) in letters])
    return len(ended) + len(letters)


def _few_rows(ended: list[Row], most: int) -> list[Row]:
    """The first of the tasks, at least one, that have no more events than that."""
    total = 0
    for number, row in enumerate(ended):
        total += row[1]
        if total > most:
            return ended[: max(1, number)]
    return ended


def put_dead_letter(tx: Transaction, letter: DeadLetter) -> None:
    values = {"topic": letter.topic, "reason": letter.reason, "message": letter.message, "at": letter.at}
    row = tx.one(tx.sql.insert_dead_letter, values)
    assert row is not None
    tx.run(tx.sql.delete_dead_letters, {"last": row[0] - DEAD_LETTERS})
