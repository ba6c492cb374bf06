"""Sealed state: what was changed or moved in the database is refused by name, and nothing else is."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_corral.exceptions import Conflict, SetupError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import Checkpoint, ClaimRequest, NewTask, SessionRecord, Terminal
from llama_corral.protocol.sealing import Sealer
from llama_corral.stores import SqlStore

S = TaskStatus
PARTS = st.lists(st.one_of(st.none(), st.integers(), st.text()), max_size=5)


# The seal


def test_a_seal_fits_what_it_was_made_of_and_nothing_else() -> None:
    sealer = Sealer(["secret"])
    seal = sealer.seal("s", "svc", 1, None, "{}")
    assert sealer.verifies(seal, "s", "svc", 1, None, "{}")
    for other in [
        ("s", "svc", 2, None, "{}"),
        ("s", "svc", "1", None, "{}"),
        ("s", "svc", 1, "", "{}"),
        ("ss", "vc", 1, None, "{}"),
        ("s", "svc", 1, "{}"),
        ("s", "svc", 1, None, "{}", ""),
    ]:
        assert not sealer.verifies(seal, *other)
    for no_seal in (None, "", seal[:-1], seal.upper(), "\ud800", "é" * 64):
        assert not sealer.verifies(no_seal, "s", "svc", 1, None, "{}")


@given(PARTS, PARTS)
def test_no_two_contents_share_a_seal(first, second) -> None:
    sealer = Sealer([b"secret"])
    # True and 1 are the same part; texts and numbers are not.
    same = [(type(part), part) for part in first] == [(type(part), part) for part in second]
    assert sealer.verifies(sealer.seal(*first), *second) == same


def test_the_first_secret_seals_and_any_verifies() -> None:
    old, new = Sealer(["old"]), Sealer(["new", "old"])
    assert new.verifies(old.seal("x"), "x")
    assert not old.verifies(new.seal("x"), "x")
    assert new.seal("x") == Sealer(["new"]).seal("x")


@pytest.mark.parametrize("secrets", [[], [""], ["good", b""]])
def test_a_secret_is_not_empty(secrets) -> None:
    with pytest.raises(SetupError) as caught:
        Sealer(secrets)
    assert caught.value.hint
    assert "good" not in str(caught.value)


@pytest.mark.promise("P11")
def test_a_sealer_does_not_tell_its_secrets() -> None:
    sealer = Sealer(["hunter2"])
    assert "hunter2" not in f"{sealer!r}{sealer}"
    for leak in (copy.copy, vars):
        with pytest.raises(TypeError):
            leak(sealer)


# What a store does with it


async def change(store: SqlStore, statement: str) -> None:
    """What somebody does who can write to the database and has no secret."""
    assert await store._write(lambda tx: tx.run(statement, {})) > 0


async def claim(store: SqlStore, task_id: str, number: int):
    return await store.claim(ClaimRequest(task_id, "i", str(number), 2.0))


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(["a secret"])


@pytest.fixture
async def sealed(url: str, sealer: Sealer, driver_of):
    """A store with a session that has a context, and a task of it with a checkpoint, ready to be claimed."""
    async with SqlStore(url, sealer) as store:
        driver = driver_of(store)
        for session_id in ("s", "r"):
            await driver.session(session_id)
            for version in range(2):
                task_id = f"{session_id}{version}"
                await driver.accept(task_id, session_id, by="i")
                await driver.end(task_id, based_on=version, payload=f'"of {task_id}"')
            task_id = f"t-{session_id}"
            await driver.accept(task_id, session_id, by="i")
            await driver.store.send(task_id, "mail", 2.0)
            await driver.report(task_id, 1, events=2, checkpoint=Checkpoint(f'"snap of {task_id}"', 1, "f"))
            await store.release(task_id, 1, None, 2.0)
        yield driver


@pytest.mark.anyio
@pytest.mark.promise("P11")
async def test_a_state_that_nobody_touched_is_used(sealed) -> None:
    taken = await sealed.claim("t-s")
    assert (taken.state_error, taken.context.version, taken.context.payload) == (None, 2, '"of s1"')
    assert (taken.checkpoint.snapshot, taken.checkpoint.event_count) == ('"snap of t-s"', 2)
    await sealed.store.release("t-s", 2, Checkpoint('"another"', 1), 3.0)
    taken = await sealed.claim("t-s", by="j")
    assert (taken.state_error, taken.checkpoint.snapshot) == (None, '"another"')
    await sealed.end("t-s", 1, 3, based_on=2, payload='"third"')
    taken = (await sealed.accept("next", "s", by="i")).claim
    assert (taken.state_error, taken.context.payload) == (None, '"third"')


CHECKPOINT = "(SELECT no FROM corral_tasks WHERE task_id = 't-s')"
OTHER = "(SELECT no FROM corral_tasks WHERE task_id = 't-r')"


@pytest.mark.anyio
@pytest.mark.promise("P11")
@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE corral_checkpoints SET snapshot = '\"evil\"' WHERE task_no = {CHECKPOINT}",
        f"UPDATE corral_checkpoints SET snapshot = x'00' WHERE task_no = {CHECKPOINT}",
        f"UPDATE corral_checkpoints SET inbox_applied = 0 WHERE task_no = {CHECKPOINT}",
        f"UPDATE corral_checkpoints SET fingerprint = NULL WHERE task_no = {CHECKPOINT}",
        f"UPDATE corral_checkpoints SET epoch = 7 WHERE task_no = {CHECKPOINT}",
        f"UPDATE corral_checkpoints SET event_count = 0 WHERE task_no = {CHECKPOINT}",
        f"UPDATE corral_checkpoints SET seal = NULL WHERE task_no = {CHECKPOINT}",
        f"UPDATE corral_checkpoints SET seal = x'00' WHERE task_no = {CHECKPOINT}",
        (
            f"UPDATE corral_checkpoints SET (snapshot, seal) = (SELECT snapshot, seal FROM corral_checkpoints "
            f"WHERE task_no = {OTHER}) WHERE task_no = {CHECKPOINT}"
        ),
        "UPDATE corral_tasks SET service_name = 'other' WHERE task_id = 't-s'",
    ],
)
async def test_a_checkpoint_that_was_changed_or_moved_is_left_out(sealed, statement: str) -> None:
    await change(sealed.store, statement)
    taken = await sealed.claim("t-s")
    assert taken.checkpoint is None
    assert "checkpoint of the task 't-s' was refused" in taken.state_error
    assert "evil" not in taken.state_error
    assert (await sealed.claim("t-s")).state_error == taken.state_error  # the answer was lost
    assert (await sealed.claim("t-r")).state_error is None


@pytest.mark.anyio
@pytest.mark.promise("P11")
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE corral_contexts SET payload = '\"evil\"' WHERE session_id = 's'",
        "UPDATE corral_contexts SET version = 3 WHERE session_id = 's'",
        "UPDATE corral_contexts SET fingerprint = 'g' WHERE session_id = 's'",
        "UPDATE corral_contexts SET seal = NULL WHERE session_id = 's'",
        (
            "UPDATE corral_contexts SET (payload, seal) = "
            "(SELECT payload, seal FROM corral_contexts WHERE session_id = 'r') WHERE session_id = 's'"
        ),
    ],
)
async def test_a_context_that_was_changed_or_moved_is_left_out(sealed, statement: str) -> None:
    await change(sealed.store, statement)
    taken = await sealed.claim("t-s")
    assert taken.context is None
    assert taken.checkpoint is not None
    assert "context of the session 's' on the service 'svc' was refused" in taken.state_error
    await sealed.end("t-s", 1, 2, status=S.FAILED)
    taken = (await sealed.accept("next", "s", by="i")).claim  # claimed as it is accepted
    assert taken.context is None
    assert "was refused" in taken.state_error


@pytest.mark.anyio
@pytest.mark.promise("P11")
async def test_both_refusals_are_said(sealed) -> None:
    await change(sealed.store, "UPDATE corral_contexts SET seal = NULL")
    await change(sealed.store, "UPDATE corral_checkpoints SET seal = 'x'")
    said = (await sealed.claim("t-s")).state_error
    assert said.count("was refused") == 2
    assert "has no seal" in said
    assert "does not fit" in said


@pytest.mark.anyio
@pytest.mark.promise("P11")
async def test_a_repetition_is_sealed_anew_and_never_whitewashes(sealed) -> None:
    store = sealed.store
    lost = Terminal(S.FAILED, error=ErrorRecord(type="workflow_changed", message="no", retryable=True))
    for task_id in ("t-s", "t-r"):
        await sealed.claim(task_id)
        await sealed.report(task_id, 1, 2, terminal=lost)
    again = await store.retry("t-s", 4.0)
    taken = await sealed.claim(again.task_id)
    assert (taken.state_error, taken.checkpoint.snapshot) == (None, '"snap of t-s"')
    await change(store, f"UPDATE corral_checkpoints SET snapshot = '\"evil\"' WHERE task_no = {OTHER}")
    with pytest.raises(Conflict) as caught:
        await store.retry("t-r", 4.0)
    assert "refused" in str(caught.value)
    assert caught.value.hint
    assert (await sealed.claim((await store.retry("t-r", 4.0, fresh=True)).task_id)).state_error is None


@pytest.mark.anyio
@pytest.mark.promise("P11")
async def test_secrets_are_replaced_and_forgotten(url: str, driver_of) -> None:
    async with SqlStore(url, Sealer(["old"])) as store:
        driver = driver_of(store)
        await driver.session()
        await driver.accept("a", "s", by="i")
        await driver.end("a", based_on=0)
    async with SqlStore(url, Sealer(["new", "old"])) as store:
        driver = driver_of(store)
        assert (await driver.accept("b", "s", by="i")).claim.state_error is None
        await driver.end("b", based_on=1)
    async with SqlStore(url, Sealer(["new"])) as store:
        driver = driver_of(store)
        assert (await driver.accept("c", "s", by="i")).claim.context.version == 2
        await driver.end("c")
    async with SqlStore(url, Sealer(["other"])) as store:
        assert (await driver_of(store).accept("d", "s", by="i")).claim.state_error
        await driver_of(store).end("d", status=S.FAILED)
    async with SqlStore(url) as store:  # without a secret everything is trusted, and what it writes has no seal
        driver = driver_of(store)
        assert (await driver.accept("e", "s", by="i")).claim.context.version == 2
        await driver.end("e", based_on=2)
    async with SqlStore(url, Sealer(["new"])) as store:
        assert "has no seal" in (await driver_of(store).accept("f", "s", by="i")).claim.state_error


@pytest.mark.anyio
async def test_a_session_with_a_refused_context_starts_again_when_it_is_deleted(sealed) -> None:
    await change(sealed.store, "UPDATE corral_contexts SET payload = '1' WHERE session_id = 's'")
    assert "Delete the session" in (await sealed.claim("t-s")).state_error
    await sealed.store.delete_session("s")
    assert await sealed.store.create_session(SessionRecord("s"))
    taken = (await sealed.store.accept(NewTask("n", "svc", "{}", 1.0, "s"), ClaimRequest("n", "i", "n", 1.0))).claim
    assert (taken.context, taken.state_error) == (None, None)
