"""What is kept and for how long: dead letters, ended tasks."""

from __future__ import annotations

import json

import anyio
import pytest

from llama_corral.control_plane import upkeep
from llama_corral.control_plane.inbound import MAX_REASON, parse_letter
from llama_corral.exceptions import NotFound
from llama_corral.protocol.messages import ActionTypes, QueueMessage
from llama_corral.queues.dead_letter import MAX_RAW_CHARACTERS, dead_letter

from .corral import Corral, open_corral
from .server import open_web


def test_letters_are_kept_whole_and_bounded() -> None:
    message = QueueMessage(action=ActionTypes.WAKE_UP, data={"password": "as it came"})
    letter = parse_letter(dead_letter(message, "topic", "why", failures=3), "dead", 5.0)
    assert (letter.topic, letter.reason, letter.at) == ("topic", "why", 5.0)
    assert json.loads(letter.message) == message.model_dump(mode="json")
    raw = parse_letter(dead_letter(b"\xff{", "topic", "no JSON"), "dead", 5.0)
    assert json.loads(raw.message) == "\ufffd{"
    foreign = parse_letter(message, "dead", 5.0)
    assert foreign.topic == "dead"
    assert json.loads(foreign.message)["id_"] == message.id_
    for huge in (QueueMessage(data={"text": "x" * 2 * MAX_RAW_CHARACTERS}), "y" * 2 * MAX_RAW_CHARACTERS):
        letter = parse_letter(dead_letter(huge, "t" * 5000, "r" * 5000), "dead", 5.0)
        assert len(json.loads(letter.message)) == MAX_RAW_CHARACTERS
        assert (len(letter.topic), len(letter.reason)) == (500, MAX_REASON)


@pytest.mark.trio
async def test_dead_letters_are_listed() -> None:
    async with open_web() as web:
        for number in range(5):
            letter = dead_letter(QueueMessage(data={"number": number}), "test.svc", f"reason {number}")
            await web.queue.publish(letter, web.topic("dead_letter"))
        await web.queue.publish(dead_letter("{", "test.svc", "no JSON"), web.topic("dead_letter"))
        with anyio.fail_after(5):
            while len(await web.plane.list_dead_letters()) < 6:
                await anyio.wait_all_tasks_blocked()
        page = (await web.client.get("/dead_letters", params={"limit": 4})).json()
        rest = (await web.client.get("/dead_letters", params={"limit": 4, "before": page["next"]})).json()
        letters = [*page["dead_letters"], *rest["dead_letters"]]
        assert [each["reason"] for each in letters] == ["no JSON", *(f"reason {n}" for n in (4, 3, 2, 1, 0))]
        assert rest["next"] is None
        assert letters[0]["message"] == "{"
        assert letters[1]["message"]["data"] == {"number": 4}
        assert (await web.client.get("/dead_letters?limit=0")).status_code == 422


def watch_purge(corral: Corral, monkeypatch: pytest.MonkeyPatch, number: int) -> anyio.Event:
    """Set when so many tasks were removed."""
    removed = anyio.Event()
    purge = corral.store.purge
    total = 0

    async def count(before: float, *, limit: int = 500) -> int:
        nonlocal total
        total += (gone := await purge(before, limit=limit))
        if total == number:
            removed.set()
        return gone

    monkeypatch.setattr(corral.store, "purge", count)
    return removed


@pytest.mark.anyio
@pytest.mark.promise("P12")
async def test_what_ended_long_ago_goes_with_all_that_belongs_to_it(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "PURGE_BATCH", 3)
    async with open_corral(retention=0.2) as corral:
        service = await corral.service(slots=20)
        ended = [await corral.plane.submit("svc", {}) for _ in range(10)]
        session = (await corral.plane.sessions.create()).session_id
        running = await corral.plane.submit("svc", {}, session_id=session)
        claims = [await service.wait_claim() for _ in range(11)]
        for claim in claims[:10]:
            await service.report(claim, {"n": 0}, {"n": 1})
            await service.complete(claim)
        removed = watch_purge(corral, monkeypatch, 10)
        slow = corral.plane.open_log(ended[0].task_id)
        await slow.open()
        await removed.wait()
        assert (await corral.store.read_events(ended[0].task_id, 0)) is None
        with pytest.raises(NotFound) as gone:
            await corral.plane.get_task(ended[0].task_id)
        assert gone.value.hint is not None
        assert "ended more than" in gone.value.hint
        # A slow reader gets what it has read, and then its end.
        assert len((await anext(slow)).events) == 2
        assert await anext(slow, None) is None
        late = corral.plane.open_log(ended[1].task_id)
        with pytest.raises(NotFound):
            await anext(late)
        assert not (await corral.plane.get_task(running.task_id)).status.is_terminal


@pytest.mark.trio
@pytest.mark.promise("P9")
async def test_a_removed_task_is_404_with_a_hint() -> None:
    async with open_web(retention=1000.0) as web:
        service = await web.service(slots=1)
        session = (await web.client.post("/sessions/create")).json()
        body = {"agent_id": "svc", "input": "{}"}
        task = (await web.client.post(f"/sessions/{session}/tasks", json=body)).json()
        claim = await service.wait_claim()
        await service.report(claim, {"n": 0})
        async with web.client.stream("GET", f"/tasks/{task}/events") as stream:
            frames = stream.aiter_lines()
            assert await anext(frames) == "id: 0"
            await service.complete(claim)
            await web.store.purge(1e12)
            rest = [line async for line in frames if line]
        # It may have been faster than the removal; either way it says how it ends.
        assert rest[-2] in ("event: end", "event: error")
        for path in ("", "/result", "/events"):
            answer = await web.client.get(f"/tasks/{task}{path}")
            assert answer.status_code == 404
            assert "ended" in answer.json()["error"]["hint"]
        assert (await web.client.get(f"/sessions/{session}/tasks/{task}/result_stream")).status_code == 404
        assert (await web.client.get(f"/sessions/{session}")).json()["task_ids"] == []


@pytest.mark.anyio
async def test_without_retention_everything_stays(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*arguments: object, **options: object) -> int:
        pytest.fail("something was removed")

    async with open_corral(retention=0) as kept:
        monkeypatch.setattr(kept.store, "purge", never)
        await kept.plane._upkeep.purge_forever()
