"""The life of a task in the store: accept, claim, report, release, and the conditions of each."""

from __future__ import annotations

import dataclasses

import pytest

from llama_corral.exceptions import Conflict, NotFound
from llama_corral.protocol.lifecycle import ENDINGS, TaskStatus
from llama_corral.protocol.records import Checkpoint, ContextUpdate, Terminal, Ticket

S = TaskStatus
pytestmark = pytest.mark.anyio


# Accept


async def test_an_accepted_task_is_queued_and_read_back(driver) -> None:
    accepted = await driver.accept("t", input='{"topic":"llamas"}', deadline=9.0)
    assert (accepted.task_id, accepted.status, accepted.created, accepted.claim) == ("t", S.QUEUED, True, None)
    record = await driver.store.get_task("t")
    assert record.input == '{"topic":"llamas"}'
    assert record.implicit_session
    assert record.session_id == accepted.session_id
    assert (record.epoch, record.attempts, record.owner, record.event_count) == (0, 0, None, 0)
    assert (record.created_at, record.started_at, record.finished_at, record.deadline) == (1.0, None, None, 9.0)
    assert await driver.store.due_tickets() == [Ticket("t", "svc")]


async def test_accept_with_a_claim_is_one_unit(driver) -> None:
    before = driver.store.statistics()["units"]
    accepted = await driver.accept("t", by="i", input="[1]")
    await driver.end("t", events=1)
    assert driver.store.statistics()["units"] - before == 2
    claim = accepted.claim
    assert accepted.status is S.RUNNING
    assert (claim.epoch, claim.attempt, claim.input, claim.next_index) == (1, 1, "[1]", 0)
    assert (claim.context, claim.checkpoint, claim.inbox) == (None, None, ())
    assert (await driver.store.get_task("t")).started_at == 2.0


@pytest.mark.promise("P2")
async def test_a_repeated_accept_answers_the_first_one(driver) -> None:
    first = await driver.accept("t", digest="d", by="i")
    again = await driver.accept("t", digest="d", by="i")
    assert again == dataclasses.replace(first, created=False)
    by_another = await driver.accept("t", digest="d", by="j")
    assert (by_another.created, by_another.claim) == (False, None)
    await driver.end("t")
    assert (await driver.accept("t", digest="d")).status is S.COMPLETED


@pytest.mark.promise("P9")
async def test_a_task_id_with_another_digest_is_a_conflict(driver) -> None:
    await driver.accept("t", digest="d")
    with pytest.raises(Conflict) as caught:
        await driver.accept("t", digest="e")
    assert caught.value.hint


@pytest.mark.promise("P9")
async def test_an_unknown_session_is_refused_and_leaves_nothing(driver) -> None:
    with pytest.raises(NotFound):
        await driver.accept("t", "nobody")
    assert await driver.store.get_task("t") is None


async def test_a_task_that_is_not_due_can_not_be_taken(driver) -> None:
    accepted = await driver.accept("t", by="i", not_before=5.0)
    assert (accepted.status, accepted.claim) == (S.QUEUED, None)
    assert await driver.store.due_tickets(now=4.0) == []
    assert await driver.claim("t", now=4.0) is None
    assert await driver.store.due_tickets(now=5.0) == [Ticket("t", "svc")]
    assert (await driver.claim("t", now=5.0)).epoch == 1


# Sessions: the line in front of a service


@pytest.mark.promise("P4")
async def test_tasks_of_a_session_run_one_at_a_time_in_order(driver) -> None:
    await driver.session()
    statuses = [(await driver.accept(task_id, "s")).status for task_id in ("a", "b", "c")]
    assert statuses == [S.QUEUED, S.HELD, S.HELD]
    assert await driver.claim("b") is None
    await driver.claim("a")
    assert (await driver.end("a")).tickets == (Ticket("b", "svc"),)
    await driver.claim("b")
    assert (await driver.end("b", status=S.FAILED)).tickets == (Ticket("c", "svc"),)
    await driver.claim("c")
    assert (await driver.end("c")).tickets == ()
    assert (await driver.accept("d", "s")).status is S.QUEUED


async def test_sessions_and_services_have_lines_of_their_own(driver) -> None:
    await driver.session("s")
    await driver.session("r")
    await driver.accept("a", "s")
    assert (await driver.accept("b", "r")).status is S.QUEUED
    assert (await driver.accept("c", "s", service="other")).status is S.QUEUED
    assert (await driver.accept("d")).status is S.QUEUED


async def test_a_held_task_that_accepts_with_a_claim_is_not_claimed(driver) -> None:
    await driver.session()
    assert (await driver.accept("a", "s", by="i")).claim is not None
    held = await driver.accept("b", "s", by="i")
    assert (held.status, held.claim) == (S.HELD, None)


async def test_the_policy_reject_refuses_while_the_session_is_busy(driver) -> None:
    await driver.session(policy="reject")
    await driver.accept("a", "s", by="i", digest="d")
    with pytest.raises(Conflict):
        await driver.accept("b", "s")
    assert not (await driver.accept("a", "s", digest="d")).created  # its own repetition is no second task
    await driver.end("a")
    assert (await driver.accept("b", "s")).status is S.QUEUED


async def test_the_policy_concurrent_holds_nothing(driver) -> None:
    await driver.session(policy="concurrent")
    assert [(await driver.accept(t, "s")).status for t in "ab"] == [S.QUEUED, S.QUEUED]


@pytest.mark.promise("P4", "P5")
async def test_cancelling_a_held_task_does_not_free_the_one_behind_it(driver) -> None:
    await driver.session()
    await driver.accept("a", "s", by="i")
    for task_id in "bc":
        await driver.accept(task_id, "s")
    answer = await driver.store.request_cancel("b", 3.0)
    assert (answer.ended, answer.tickets, answer.status) == (True, (), S.CANCELLED)
    assert (await driver.end("a")).tickets == (Ticket("c", "svc"),)


# Claim


@pytest.mark.promise("P2")
async def test_only_the_first_claim_of_a_ticket_gets_the_task(driver) -> None:
    await driver.accept("t")
    first = await driver.claim("t", by="i")
    assert first.epoch == 1
    assert await driver.claim("t", by="j") is None
    assert await driver.claim("t", by="i", nonce="other") is None
    assert await driver.claim("t", by="i") == first
    assert (await driver.store.get_task("t")).owner == "i"
    await driver.end("t")
    assert await driver.claim("t", by="i") is None
    assert await driver.claim("unknown") is None


@pytest.mark.promise("P2")
async def test_a_claim_brings_what_the_run_starts_from(driver) -> None:
    await driver.session()
    await driver.accept("a", "s", by="i")
    await driver.end("a", based_on=0, payload='{"x":1}')
    await driver.accept("t", "s", by="i")
    for number in range(3):
        await driver.store.send("t", f"e{number}", 2.5)
    await driver.report("t", 1, events=2, checkpoint=Checkpoint("snap", 2, "f"))
    await driver.store.release("t", 1, None, 3.0)
    claim = await driver.claim("t", by="j")
    assert (claim.epoch, claim.attempt, claim.next_index, claim.session_id) == (2, 1, 2, "s")
    assert claim.checkpoint == Checkpoint("snap", 2, "f", event_count=2)
    assert [(event.seq, event.payload) for event in claim.inbox] == [(3, "e2")]
    assert (claim.context.version, claim.context.payload, claim.context.fingerprint) == (1, '{"x":1}', "f")
    assert await driver.claim("t", by="j") == claim


# Report


@pytest.mark.promise("P3")
async def test_indices_have_no_gap_whatever_the_reports_are(driver) -> None:
    await driver.accept("t", by="i")
    assert (await driver.report("t", 1, events=3)).next_index == 3
    assert (await driver.report("t", 2)).next_index == 3
    assert (await driver.report("t", 2, events=1)).next_index == 3  # a repetition
    assert (await driver.report("t", 3, events=2)).next_index == 5
    await driver.store.release("t", 1, None, 3.0)
    await driver.claim("t", by="j")
    assert (await driver.end("t", 1, 2, events=1)).next_index == 6
    assert await driver.indices("t") == list(range(6))
    page = await driver.store.read_events("t", 0)
    assert [event.epoch for event in page.events] == [1] * 5 + [2]
    assert page.record.event_count == 6


@pytest.mark.promise("P1")
@pytest.mark.parametrize("status", list(ENDINGS))
async def test_a_task_ends_once_and_stays_as_it_ended(driver, status: TaskStatus) -> None:
    await driver.accept("t", by="i")
    assert (await driver.end("t", 1, status=status)).status == "ok"
    record = await driver.store.get_task("t")
    assert record.status is status
    assert record.finished_at == 3.0
    if status is S.COMPLETED:
        assert (record.result, record.result_text, record.error) == ('"yes"', "yes", None)
    else:
        assert (record.result, record.result_text, record.error.type) == (None, "no", "ValueError")
    for other in ENDINGS:
        assert (await driver.end("t", 2, status=other, events=1)).status == "fenced"
    assert (await driver.end("t", 1, status=status, events=1)).status == "ok"  # repeated: its answer was lost
    assert (await driver.store.release("t", 1, None, 4.0)).status == "fenced"
    assert await driver.store.get_task("t") == record


@pytest.mark.promise("P2")
async def test_only_the_stored_epoch_writes(driver) -> None:
    await driver.accept("t", by="i")
    assert (await driver.report("t", 1, epoch=2)).status == "fenced"
    await driver.store.reap(["i"], 3.0)
    assert (await driver.end("t", 1, epoch=1)).status == "fenced"  # queued again: nobody holds it
    await driver.claim("t", by="j")
    assert (await driver.end("t", 1, epoch=1, events=1)).status == "fenced"
    assert (await driver.end("t", 1, epoch=2)).status == "ok"
    assert await driver.indices("t") == []
    assert (await driver.report("unknown")).status == "deleted"


async def test_waiting_and_running_follow_the_reports(driver) -> None:
    await driver.accept("t", by="i")
    for seq, (waiting, status) in enumerate([(True, S.WAITING), (None, S.WAITING), (False, S.RUNNING)], 1):
        await driver.report("t", seq, waiting=waiting)
        assert await driver.status("t") is status
    await driver.report("t", 4, waiting=True)
    assert (await driver.end("t", 5)).status == "ok"


@pytest.mark.promise("P2")
async def test_a_run_that_left_memory_writes_nothing_more(driver) -> None:
    await driver.accept("t", by="i")
    await driver.store.release("t", 1, Checkpoint("s", 0), 3.0, idle=True)
    assert (await driver.report("t", 1, waiting=False)).status == "fenced"
    assert (await driver.end("t", 1)).status == "fenced"
    assert await driver.status("t") is S.WAITING


@pytest.mark.promise("P5")
async def test_a_repeated_ending_names_the_freed_task_again(driver) -> None:
    await driver.session()
    await driver.accept("a", "s", by="i")
    await driver.accept("b", "s")
    assert (await driver.end("a")).tickets == (await driver.end("a")).tickets == (Ticket("b", "svc"),)
    await driver.claim("b")
    assert (await driver.end("a")).tickets == ()


# Context


@pytest.mark.promise("P4")
async def test_the_context_is_stored_with_a_version(driver) -> None:
    await driver.session()
    for version, task_id in enumerate("abc"):
        claim = (await driver.accept(task_id, "s", by="i")).claim
        assert (0 if claim.context is None else claim.context.version) == version
        await driver.end(task_id, based_on=version, payload=f'"{task_id}"')
        assert (await driver.store.get_task(task_id)).context_saved is True
    assert (await driver.accept("d", "s", by="i")).claim.context.payload == '"c"'


@pytest.mark.promise("P1", "P4")
@pytest.mark.parametrize("based_on", [0, 1, 3])
async def test_a_version_conflict_does_not_refuse_the_ending(driver, based_on: int) -> None:
    await driver.session(policy="concurrent")
    for version in range(2):
        await driver.accept(f"before{version}", "s", by="i")
        await driver.end(f"before{version}", based_on=version, payload='"good"')
    await driver.accept("t", "s", by="i")
    assert (await driver.end("t", based_on=based_on, payload='"stale"')).status == "ok"
    record = await driver.store.get_task("t")
    assert (record.status, record.context_saved) == (S.COMPLETED, False)
    assert "version 2" in record.context_error
    assert (await driver.accept("u", "s", by="i")).claim.context.payload == '"good"'


@pytest.mark.promise("P4")
async def test_a_failed_run_never_replaces_the_context(driver) -> None:
    await driver.session()
    await driver.accept("a", "s", by="i")
    await driver.end("a", based_on=0, payload='"good"')
    await driver.accept("b", "s", by="i")
    await driver.end("b", based_on=1, payload='"bad"', status=S.FAILED)
    assert (await driver.store.get_task("b")).context_saved is None
    assert (await driver.accept("c", "s", by="i")).claim.context.payload == '"good"'


@pytest.mark.promise("P4")
async def test_a_context_that_could_not_be_encoded_is_said(driver) -> None:
    await driver.session()
    await driver.accept("a", "s", by="i")
    ending = Terminal(S.COMPLETED, "1", "1", context_error="a socket is no JSON")
    await driver.report("a", terminal=ending, context=ContextUpdate(0, "{}"))
    record = await driver.store.get_task("a")
    assert (record.status, record.context_saved, record.context_error) == (S.COMPLETED, False, "a socket is no JSON")
    assert (await driver.accept("b", "s", by="i")).claim.context is None


async def test_no_context_is_kept_for_an_implicit_session(driver) -> None:
    accepted = await driver.accept("t", by="i")
    await driver.end("t", based_on=0)
    assert (await driver.store.get_task("t")).context_saved is None
    assert await driver.store.get_session(accepted.session_id) is None
    assert await driver.store.list_sessions() == []


# Checkpoint and release


@pytest.mark.promise("P2")
async def test_progress_sets_the_attempts_back(driver) -> None:
    await driver.accept("t", by="i", max_attempts=3)
    await driver.store.reap(["i"], 3.0)
    assert (await driver.claim("t", by="j")).attempt == 2
    await driver.report("t", 1, epoch=2, checkpoint=Checkpoint("s", 0))
    await driver.store.reap(["j"], 3.0)
    assert (await driver.claim("t", by="k")).attempt == 2


async def test_an_ending_leaves_no_checkpoint_and_no_inbox(driver) -> None:
    await driver.accept("t", by="i")
    await driver.store.send("t", "e", 2.0)
    await driver.report("t", 1, checkpoint=Checkpoint("s", 0))
    await driver.end("t", 2)

    def count(tx) -> list[int]:
        return [tx.all(f"SELECT count(*) FROM corral_{name}", {})[0][0] for name in ("checkpoints", "task_inbox")]

    assert await driver.store._read(count) == [0, 0]


@pytest.mark.promise("P5")
async def test_release_hands_the_task_back_with_a_ticket(driver) -> None:
    await driver.accept("t", by="i")
    answer = await driver.store.release("t", 1, Checkpoint("s", 0), 3.0)
    assert (answer.status, answer.tickets) == ("ok", (Ticket("t", "svc"),))
    assert await driver.store.release("t", 1, Checkpoint("s", 0), 3.0) == answer  # its answer was lost
    record = await driver.store.get_task("t")
    assert (record.status, record.owner) == (S.QUEUED, None)
    assert (await driver.report("t", 1)).status == "fenced"
    assert (await driver.claim("t", by="j")).checkpoint == Checkpoint("s", 0)
    assert (await driver.store.release("t", 1, None, 3.0)).status == "fenced"
    assert (await driver.store.release("t", 2, None, 3.0)).status == "ok"
    assert (await driver.claim("t", by="k")).checkpoint == Checkpoint("s", 0)
    assert (await driver.store.release("unknown", 1, None, 3.0)).status == "deleted"


async def test_an_idle_run_leaves_memory_until_an_event_comes(driver) -> None:
    await driver.accept("t", by="i")
    await driver.store.send("t", "a", 2.0)
    await driver.report("t", 1, waiting=True)
    answer = await driver.store.release("t", 1, Checkpoint("s", 1), 3.0, idle=True)
    assert answer.tickets == ()
    assert await driver.store.release("t", 1, Checkpoint("s", 1), 3.0, idle=True) == answer
    record = await driver.store.get_task("t")
    assert (record.status, record.owner) == (S.WAITING, None)
    sent = await driver.store.send("t", "b", 4.0)
    assert (sent.status, sent.owner, sent.tickets, sent.seq) == (S.QUEUED, None, (Ticket("t", "svc"),), 2)
    assert (await driver.store.send("t", "c", 4.0)).tickets == ()
    assert [event.payload for event in (await driver.claim("t", by="j")).inbox] == ["b", "c"]


async def test_an_idle_run_with_unread_events_is_queued(driver) -> None:
    await driver.accept("t", by="i")
    await driver.report("t", 1, waiting=True)
    await driver.store.send("t", "a", 2.0)
    answer = await driver.store.release("t", 1, Checkpoint("s", 0), 3.0, idle=True)
    assert answer.tickets == (Ticket("t", "svc"),)
    assert await driver.status("t") is S.QUEUED
