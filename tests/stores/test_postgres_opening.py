"""Which PostgreSQL databases can be a store, and what is said of those that can not."""

from __future__ import annotations

import logging
import secrets
import subprocess
import sys
from typing import Any

import anyio
import pytest

from llama_corral.exceptions import BadInput, StoreError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.records import DeadLetter, NewTask, SessionRecord
from llama_corral.stores import SqlStore, open_store, schema, tables
from llama_corral.stores.secret_file import read_secret_file
from llama_corral.testing.servers import PostgresServer

from ..queues.servers import own_server
from .postgres import Place

NOW = tables.SCHEMA_VERSION
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "trio"  # one is enough: opening happens in a thread


async def refusal(url: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        async with open_store(url):
            pytest.fail("the store was opened")
    assert caught.value.hint
    return caught.value


async def accept(store: SqlStore, task_id: str = "t") -> None:
    assert (await store.accept(NewTask(task_id, "svc", "{}", 1.0))).created


def create_latin(url: str) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")


# Without a server


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llama_corral.stores.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError) as caught:
        open_store("postgresql://user:secret@host/db")
    assert "llama-corral[postgres]" in caught.value.hint
    assert "secret" not in str(caught.value)


@pytest.mark.process
def test_other_stores_do_without_the_package() -> None:
    code = "import sys; from llama_corral.stores import open_store; open_store('sqlite://'); print('psycopg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


def test_a_store_on_a_server_has_no_secret_file() -> None:
    for scheme in ("postgresql", "postgres"):
        assert read_secret_file(f"{scheme}://user@host/db") is None
        assert not open_store(f"{scheme}://user@host/db").exclusive  # nothing is opened


@pytest.mark.promise("P11")
async def test_what_can_not_be_used_is_said_without_the_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with own_server(PostgresServer, "CORRAL_TEST_POSTGRES_URL") as server:
        secret, at = server.password, f"127.0.0.1:{server.port}"
        await anyio.to_thread.run_sync(create_latin, server.url)
        told: list[Any] = []
        for url, words in {
            server.url + "no_such": "does not exist",
            f"postgresql://postgres:not{secret}@{at}/postgres": "password authentication failed",
            f"postgresql://postgres@{at}/postgres": "no password supplied",
            f"postgresql://postgres:{secret}@127.0.0.1:1/postgres": "refused",
            f"postgresql://postgres:{secret}@{secret}.invalid/postgres": "***.invalid",
            server.url + "?options=-csearch_path%3Dno_such": "search_path",
            server.url + "?options=-cno_such%3D1": "no_such",
            server.url.removesuffix("postgres") + "latin": "LATIN1",
        }.items():
            error = await refusal(url)
            assert words in str(error)
            told += [error, error.hint, error.fields, error.__cause__ if ".invalid" not in url else ""]
        async with SqlStore(server.url) as store:
            told += [repr(store), repr(store._database), repr(vars(store._database)), store.statistics()]
            await server.stop()
            with pytest.raises(Exception, match="away") as caught:
                await accept(store)
            told += [caught.value, caught.value.hint]
        told += [record.getMessage() for record in caplog.records]
        assert not [line for line in told if secret in str(line)]


# Tables


@pytest.mark.promise("P8")
async def test_tables_of_others_are_not_touched(new_place: Place) -> None:
    new_place.execute("CREATE TABLE theirs (x int); INSERT INTO theirs VALUES (1)")
    async with SqlStore(new_place.url) as store:
        await accept(store)
    assert new_place.execute("SELECT x FROM theirs") == [(1,)]
    names = new_place.execute(f"SELECT tablename FROM pg_tables WHERE schemaname = '{new_place.schema}'")
    assert {name for (name,) in names} == {"theirs", *(table.name for table in tables.metadata.sorted_tables)}


async def test_tables_that_only_look_like_ours_are_refused(new_place: Place) -> None:
    new_place.execute("CREATE TABLE corral_tasks (x int)")
    assert "another program" in str(await refusal(new_place.url))
    new_place.execute("CREATE TABLE corral_meta (x int)")
    assert "schema version" in str(await refusal(new_place.url))
    names = new_place.execute(f"SELECT tablename FROM pg_tables WHERE schemaname = '{new_place.schema}'")
    assert len(names) == 2


async def test_many_that_start_at_once_create_the_tables_once(new_place: Place) -> None:
    async def open_and_accept(number: int) -> None:
        async with SqlStore(new_place.url) as store:
            await accept(store, f"t{number}")

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(open_and_accept, number)
    assert new_place.execute("SELECT count(*) FROM corral_tasks") == [(5,)]


async def test_a_newer_schema_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqlStore(place.url):
        pass
    place.execute(f"UPDATE corral_meta SET value = '{NOW + 1}' WHERE key = 'schema_version'")
    error = await refusal(place.url)
    assert (error.fields["found"], error.fields["known"]) == (NOW + 1, NOW)
    place.execute(f"UPDATE corral_meta SET value = '{NOW}' WHERE key = 'schema_version'")


STEPS = {NOW: ("CREATE TABLE corral_new (x TEXT)",), NOW + 1: ("INSERT INTO corral_new VALUES ('100%')",)}


async def test_an_older_schema_is_led_forward_by_the_first(new_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqlStore(new_place.url) as store:
        await accept(store)
    monkeypatch.setattr(tables, "SCHEMA_VERSION", NOW + 2)
    monkeypatch.setattr(schema, "MIGRATIONS", {"postgresql": STEPS})

    async def look() -> None:
        async with SqlStore(new_place.url) as store:
            assert (await store.get_task("t")).status is TaskStatus.QUEUED

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(look)
    assert new_place.execute("SELECT x FROM corral_new") == [("100%",)]
    assert new_place.execute("SELECT value FROM corral_meta WHERE key = 'schema_version'") == [(str(NOW + 2),)]


async def test_a_migration_that_fails_changes_nothing(new_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqlStore(new_place.url):
        pass
    with monkeypatch.context() as newer:
        newer.setattr(tables, "SCHEMA_VERSION", NOW + 1)
        assert "no migration" in str(await refusal(new_place.url))
        newer.setattr(schema, "MIGRATIONS", {"postgresql": {NOW: (*STEPS[NOW], "not SQL")}})
        assert "syntax error" in str(await refusal(new_place.url))
    async with SqlStore(new_place.url):
        assert new_place.execute("SELECT to_regclass('corral_new')") == [(None,)]


async def test_nobody_changes_the_tables_under_a_control_plane_at_work(
    new_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqlStore(new_place.url) as store:
        with monkeypatch.context() as newer:
            newer.setattr(tables, "SCHEMA_VERSION", NOW + 2)
            newer.setattr(schema, "MIGRATIONS", {"postgresql": STEPS})
            newer.setattr("llama_corral.stores.postgres_schema._LOCK_TIME", "100ms")
            error = await refusal(new_place.url)
            assert "other control planes" in str(error)
            assert error.fields["found"] == NOW
        await accept(store)


# What the URL and the operator say


async def test_the_url_may_say_more_than_where_the_database_is(place: Place) -> None:
    def setting(name: str) -> Any:
        return lambda tx: tx.one(f"SHOW {name}", {})[0]

    async with SqlStore(place.url, durable="full") as store:
        assert await store._write(setting("lock_timeout")) == "3s"
        assert await store._write(setting("synchronous_commit")) in ("on", "remote_write", "remote_apply")
    less = place.url_with(f"-csearch_path={place.schema} -clock_timeout=7s -csynchronous_commit=off")
    async with SqlStore(less) as store:
        assert await store._write(setting("lock_timeout")) == "7s"
        assert await store._write(setting("synchronous_commit")) == "off"
        assert await store._read(setting("transaction_isolation")) == "repeatable read"
    async with SqlStore(less, durable="full") as store:
        assert await store._write(setting("synchronous_commit")) == "on"


# Values


@pytest.mark.promise("P9")
async def test_text_with_a_nul_is_the_callers_error(place: Place) -> None:
    async with SqlStore(place.url) as store:
        for call in (
            store.accept(NewTask("t", "svc", "a\0b", 1.0)),
            store.get_task("a\0b"),
            store.put_dead_letter(DeadLetter("topic", "\0", "{}", 1.0)),
            store.accept(NewTask(secrets.token_hex(5_000), "svc", "{}", 1.0)),  # no index takes it
            store.accept(NewTask("t", "svc", "{}", 1.0, max_attempts=2**64)),
        ):
            with pytest.raises(BadInput, match="cannot be stored"):
                await call
        await accept(store)


@pytest.mark.parametrize("text", ["100%", "%(task_id)s %s %%", "a'b\"c\\d", "\u2028\x01 Ä 🦙", '{"a":"\\u0000"}', " "])
async def test_text_comes_back_as_it_was(place: Place, text: str) -> None:
    async with SqlStore(place.url) as store:
        await store.accept(NewTask("t", text, text, 1.0))
        record = await store.get_task("t")
        assert (record.service_name, record.input) == (text, text)


async def test_numbers_come_back_as_they_were(place: Place) -> None:
    async with SqlStore(place.url) as store:
        for number, moment in enumerate((0.1, 1e300, 1764090000.1234567, -1.5, float("inf"))):
            await store.accept(NewTask(f"t{number}", "svc", "{}", moment, deadline=moment))
            record = await store.get_task(f"t{number}")
            assert (record.created_at, record.deadline) == (moment, moment)


async def test_ids_are_in_the_order_of_their_bytes(place: Place) -> None:
    async with SqlStore(place.url) as store:
        for session_id in ("b", "B", "a", "_", "ä", "A"):
            await store.create_session(SessionRecord(session_id))
        assert [each.session_id for each in await store.list_sessions()] == ["A", "B", "_", "a", "b", "ä"]
