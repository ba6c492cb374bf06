"""A file that an earlier llama-corral wrote goes on as if it had always been ours."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import Checkpoint, DeadLetter, InstanceRecord, Ticket
from llama_corral.stores import SqlStore

S = TaskStatus
pytestmark = pytest.mark.anyio

ROWS = """
INSERT INTO corral_instances (instance_id, service_name, capacity, heartbeat, started_at) VALUES ('i', 'svc', 8, 3, 1.0);
INSERT INTO corral_sessions (session_id, state, version, policy, created_at) VALUES ('s', '{}', 0, 'enqueue', 1.0);
INSERT INTO corral_contexts (session_id, service_name, version, payload, fingerprint) VALUES ('s', 'svc', 2, '{"x":1}', 'f');
INSERT INTO corral_tasks (no, task_id, session_id, implicit_session, service_name, status, epoch, max_attempts, owner,
  nonce, event_count, inbox_head, has_checkpoint, created_at, started_at, finished_at, deadline, input, result)
VALUES
  (1, 'ended', 'ended', 1, 'svc', 'completed', 1, 3, 'i', 'n', 1, 1, 1, 1.0, 1.0, 2.0, NULL, '{}', '1'),
  (2, 'failed', 'failed', 1, 'svc', 'failed', 1, 3, 'i', 'n', 0, 1, 1, 1.0, 1.0, 2.5, NULL, '{}', NULL),
  (3, 'running', 's', 0, 'svc', 'running', 1, 3, 'i', 'n', 0, 0, 1, 1.0, 1.0, NULL, NULL, '{}', NULL),
  (4, 'due', 'due', 1, 'svc', 'queued', 0, 3, NULL, NULL, 0, 0, 0, 1.0, NULL, NULL, 9.0, '{}', NULL);
INSERT INTO corral_task_events VALUES (1, 0, 1, 'E', '{}');
INSERT INTO corral_checkpoints (task_no, epoch, inbox_applied, snapshot, fingerprint) VALUES (3, 1, 0, 'snap', 'f');
"""


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    path = tmp_path / "corral.db"
    connection = sqlite3.connect(path)
    connection.executescript((Path(__file__).parent / "version_1.sql").read_text() + ROWS)
    connection.close()
    return path


def shape(path: Path) -> dict[str, object]:
    """Columns and indexes, whatever words made them."""
    connection = sqlite3.connect(path)
    shapes: dict[str, object] = {}
    for name, kind, text in connection.execute("SELECT name, type, sql FROM sqlite_master").fetchall():
        if kind == "table":
            # The order of the columns differs: new ones are added at the end.
            columns = connection.execute(
                'SELECT name, type, "notnull", dflt_value, pk FROM pragma_table_info(?)', (name,)
            )
            shapes[name] = sorted(columns.fetchall())
        elif text is not None:
            shapes[name] = text
    connection.close()
    return shapes


async def test_a_file_of_version_1_becomes_what_a_new_file_is(tmp_path: Path, version_1: Path) -> None:
    for path in (version_1, tmp_path / "new.db"):
        async with SqlStore(f"sqlite:///{path}"):
            pass
    assert shape(version_1) == shape(tmp_path / "new.db")


@pytest.mark.promise("P1", "P2")
async def test_what_a_file_of_version_1_holds_goes_on(version_1: Path, driver_of) -> None:
    async with SqlStore(f"sqlite:///{version_1}") as store:
        driver = driver_of(store)
        assert await store.list_instances() == [InstanceRecord("i", "svc", 8, 1.0, 3, embedded=False)]
        assert (await store.get_task("ended")).retry_of is None
        assert await store.next_due(0.0) == 9.0
        assert [answer.task_id for answer in await store.expire(9.0)] == ["due"]
        assert (await store.reap(["i"], 9.0)).tickets == (Ticket("running", "svc"),)
        claim = await driver.claim("running", by="j")
        assert claim.checkpoint == Checkpoint("snap", 0, "f", event_count=0)
        assert (claim.context.version, claim.retry, claim.state_error) == (2, None, None)
        assert (await driver.end("running", 1, 2, based_on=2)).status == "ok"
        again = await store.retry("failed", 9.0)
        assert (await driver.claim(again.task_id)).inbox == ()
        await store.put_dead_letter(DeadLetter("topic", "no JSON", '"x"', 9.0))
        assert [letter.no for letter in await store.list_dead_letters()] == [1]
        assert await store.purge(2.6) == 2
        assert await driver.status("failed") is None
