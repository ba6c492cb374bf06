"""Which files can be a store, who may use one, and what a killed process leaves behind."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from llama_corral.exceptions import StoreError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import NewTask
from llama_corral.stores import SqlStore, open_store, schema, tables

NOW = tables.SCHEMA_VERSION
pytestmark = pytest.mark.anyio


async def refusal(url: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        async with open_store(url):
            pytest.fail("the store was opened")
    return caught.value


# URLs


@pytest.mark.parametrize(
    "url",
    [
        "corral.db",
        "postgresql://user:half@secret@host/db",
        "postgres://user:half/secret@host/db",
        "postgresql://user:secret@host/db?no_such_option=secret",
        "postgresql://user@host:secret/db",
        "mysql://user:secret@host/db",
        "nonsense://user:secret@host",
        "sqlite://user:secret@host/db",
        "sqlite:///file.db?mode=ro&key=secret",
        "://user:secret@",
    ],
)
def test_a_url_that_names_no_store_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert caught.value.hint
    assert "secret" not in f"{caught.value}{caught.value.hint}{caught.value.fields}{caught.value.__cause__}"


def test_the_durability_is_one_of_two() -> None:
    with pytest.raises(StoreError):
        SqlStore("sqlite://", durable="very")  # type: ignore[arg-type]


@pytest.mark.parametrize(("durable", "synchronous"), [("normal", 1), ("full", 2)])
async def test_what_durable_means_to_sqlite(url: str, durable, synchronous: int) -> None:
    async with SqlStore(url, durable=durable) as store:
        assert await store._write(lambda tx: tx.one("PRAGMA synchronous", {})) == (synchronous,)
        assert await store._read(lambda tx: tx.one("PRAGMA journal_mode", {})) == ("wal",)


# Files


@pytest.mark.promise("P8")
async def test_a_file_of_somebody_else_is_refused_and_not_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    text = tmp_path / "notes.txt"
    text.write_text("my notes, not a database\n" * 10)
    for path in (foreign, text):
        content = path.read_bytes()
        error = await refusal(f"sqlite:///{path}")
        assert "another program" in str(error) or "not an SQLite database" in str(error)
        assert error.hint
        assert path.read_bytes() == content
    assert set(os.listdir(tmp_path)) == {"foreign.db", "notes.txt"}


async def test_a_newer_schema_is_refused(url: str, monkeypatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(tables, "SCHEMA_VERSION", NOW + 1)
        async with SqlStore(url):
            pass
    error = await refusal(url)
    assert (error.fields["found"], error.fields["known"]) == (NOW + 1, NOW)
    assert error.hint


async def test_an_older_schema_is_led_forward(url: str, monkeypatch) -> None:
    async with SqlStore(url) as store:
        await store.accept(NewTask("t", "svc", "{}", 1.0))
    monkeypatch.setattr(tables, "SCHEMA_VERSION", NOW + 2)
    steps = {NOW: ("CREATE TABLE corral_new (x TEXT)",), NOW + 1: ("INSERT INTO corral_new VALUES ('moved')",)}
    monkeypatch.setattr(schema, "MIGRATIONS", {"sqlite": steps})
    for _ in range(2):
        async with SqlStore(url) as store:
            assert await store._read(lambda tx: tx.all("SELECT x FROM corral_new", {})) == [("moved",)]
            assert await store._read(lambda tx: tx.one(tx.sql.get_meta, {"key": "schema_version"})) == (str(NOW + 2),)
            assert await store.get_task("t") is not None


async def test_a_migration_that_fails_changes_nothing(url: str, monkeypatch) -> None:
    async with SqlStore(url):
        pass
    with monkeypatch.context() as newer:
        newer.setattr(tables, "SCHEMA_VERSION", NOW + 1)
        assert "no migration" in str(await refusal(url))
        newer.setattr(schema, "MIGRATIONS", {"sqlite": {NOW: ("CREATE TABLE corral_new (x TEXT)", "not SQL")}})
        assert await refusal(url)
    async with SqlStore(url) as store:
        assert await store._read(lambda tx: tx.all("SELECT 1 FROM sqlite_master WHERE name = 'corral_new'", {})) == []


@pytest.mark.parametrize("place", ["missing/corral.db", "file/corral.db", "directory"])
async def test_a_place_where_no_file_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    error = await refusal(f"sqlite:///{tmp_path / place}")
    assert error.hint


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that not even root can write to")
async def test_a_directory_that_is_not_writable() -> None:
    error = await refusal("sqlite:////proc/self/corral.db")
    assert "writable" in error.hint


@pytest.mark.parametrize("keep", [100, 5000])
async def test_a_corrupt_file_is_refused(tmp_path: Path, url: str, keep: int) -> None:
    async with SqlStore(url):
        pass
    path = tmp_path / "corral.db"
    path.write_bytes(path.read_bytes()[:keep] + os.urandom(4096))
    assert (await refusal(url)).hint


async def test_a_store_without_its_version_is_refused(tmp_path: Path, url: str) -> None:
    async with SqlStore(url):
        pass
    connection = sqlite3.connect(tmp_path / "corral.db")
    connection.execute("DELETE FROM corral_meta")
    connection.commit()
    connection.close()
    assert "schema version" in str(await refusal(url))


async def test_an_empty_file_becomes_a_store(tmp_path: Path, url: str) -> None:
    (tmp_path / "corral.db").touch()
    async with SqlStore(url) as store:
        await store.accept(NewTask("t", "svc", "{}", 1.0))
    async with SqlStore(url) as store:
        assert await store.get_task("t") is not None


# Processes


@pytest.mark.promise("P8")
async def test_a_store_is_used_once_at_a_time(tmp_path: Path, url: str) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "corral.db")
    async with SqlStore(url):
        for other in (url, f"sqlite:///{tmp_path / 'link.db'}"):
            error = await refusal(other)
            assert error.fields["pid"] == os.getpid()
            assert str(os.getpid()) in str(error)
    async with SqlStore(f"sqlite:///{tmp_path / 'link.db'}"):
        pass


CHILD = """
import sys, anyio
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import ClaimRequest, EventRecord, NewTask, Report, Terminal
from llama_corral.stores import SqlStore

async def work(store, worker):
    for number in range(1_000_000):
        task_id = f"{worker}-{number}"
        await store.accept(NewTask(task_id, "svc", "{}", 1.0), ClaimRequest(task_id, "i", "n", 1.0))
        print("accepted", task_id, flush=True)
        events = (EventRecord("E", "{}"),) * 3
        await store.report(Report(task_id, 1, 1, 2.0, events, terminal=Terminal(TaskStatus.COMPLETED)))
        print("ended", task_id, flush=True)

async def main():
    async with SqlStore(sys.argv[1]) as store, anyio.create_task_group() as task_group:
        for worker in range(8):
            task_group.start_soon(work, store, worker)

anyio.run(main, backend="trio")
"""


@pytest.mark.process
@pytest.mark.promise("P1", "P3")
async def test_a_killed_process_loses_nothing_that_it_was_told(tmp_path: Path, url: str) -> None:
    """Another process works on the store, is refused to us meanwhile, and is killed in the middle."""

    def work_and_kill() -> list[str]:
        with subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(400)]
            assert anyio.run(refusal, url).fields["pid"] == child.pid
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.readlines()
        return [line for line in lines if line.endswith("\n")]

    told = [line.split() for line in await anyio.to_thread.run_sync(work_and_kill)]
    assert len(told) >= 400
    async with SqlStore(url) as store:
        for what, task_id in told:
            page = await store.read_events(task_id, 0)
            assert page is not None
            ended = page.record.status is TaskStatus.COMPLETED
            assert ended or (what == "accepted" and page.record.status is TaskStatus.RUNNING)
            assert [event.index for event in page.events] == ([0, 1, 2] if ended else [])
        assert await store._read(lambda tx: tx.one("PRAGMA integrity_check", {})) == ("ok",)
        assert len((await store.reap(["i"], 3.0)).tickets) <= 8
