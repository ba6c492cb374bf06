"""What keeps the store small: retention, and the bounded list of messages that nobody can use. The rules of
`accept_units` hold here too."""

from __future__ import annotations

from typing import Final

from ..protocol.records import DeadLetter
from .endings import forget_epochs
from .transaction import Transaction

DEAD_LETTERS: Final = 10_000
"""The most that are kept; of more, the oldest go."""


def purge(tx: Transaction, before: float, limit: int) -> int:
    ended = tx.all(tx.sql.ended_before, {"before": before, "limit": limit})
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
    letters = tx.all(tx.sql.dead_letters_before, {"before": before, "limit": limit - len(ended)})
    if letters:
        tx.run_many(tx.sql.delete_dead_letter, [{"no": no} for (no,) in letters])
    return len(ended) + len(letters)


def put_dead_letter(tx: Transaction, letter: DeadLetter) -> None:
    values = {"topic": letter.topic, "reason": letter.reason, "message": letter.message, "at": letter.at}
    row = tx.one(tx.sql.insert_dead_letter, values)
    assert row is not None
    tx.run(tx.sql.delete_dead_letters, {"last": row[0] - DEAD_LETTERS})
