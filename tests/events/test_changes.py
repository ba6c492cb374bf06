from __future__ import annotations

import anyio
import pytest

from llama_corral.events import Changes


@pytest.mark.promise("P3")
@pytest.mark.anyio
async def test_news_since_the_handle_was_taken_counts(changes: Changes) -> None:
    with changes.watch("t") as watch:
        changes.notify("t")
        changes.notify("t")
        assert watch.has_news
        await watch.wait()
        assert not watch.has_news


@pytest.mark.promise("P12")
def test_nothing_is_left_behind(changes: Changes) -> None:
    changes.notify("nobody watches")
    changes.notify_all()
    assert changes.statistics() == {"tasks": 0, "watches": 0}
    with changes.watch("t"), changes.watch("t"), changes.watch("u"):
        assert changes.statistics() == {"tasks": 2, "watches": 3}
    assert changes.statistics() == {"tasks": 0, "watches": 0}


@pytest.mark.promise("P3")
@pytest.mark.anyio
async def test_only_the_watchers_of_the_task_are_woken(changes: Changes) -> None:
    woken: list[str] = []

    async def wait(name: str, task_id: str, endings_only: bool) -> None:
        with changes.watch(task_id, endings_only=endings_only) as watch:
            await watch.wait()
            woken.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, "events", "t", False)
        tasks.start_soon(wait, "ending", "t", True)
        tasks.start_soon(wait, "other", "u", False)
        await anyio.wait_all_tasks_blocked()
        changes.notify("t", ended=False)
        await anyio.wait_all_tasks_blocked()
        assert woken == ["events"]
        changes.notify("t")
        await anyio.wait_all_tasks_blocked()
        assert woken == ["events", "ending"]
        changes.notify_all()
    assert woken == ["events", "ending", "other"]


@pytest.mark.promise("P6")
@pytest.mark.anyio
async def test_a_cancelled_wait_keeps_the_news(changes: Changes) -> None:
    with changes.watch("t") as watch:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch.wait)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
                changes.notify("t")
        # Whether the wait had returned or not: whoever was cancelled looks again before waiting.
        changes.notify("t")
        await watch.wait()


def test_a_handle_can_be_entered_again(changes: Changes) -> None:
    watch = changes.watch("t")
    with watch:
        changes.notify("t")
    with watch:
        assert not watch.has_news
