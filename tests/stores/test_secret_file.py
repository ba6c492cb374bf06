"""The secret beside a store: made once, private, and missed when it is gone."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from llama_corral.deploy import DeployOptions, open_core
from llama_corral.exceptions import StoreError
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import (
    ClaimRequest,
    ContextUpdate,
    NewTask,
    Report,
    ServiceRecord,
    SessionRecord,
    Terminal,
)
from llama_corral.settings import StateSettings

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P11")]


@pytest.fixture(autouse=True)
def _no_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORRAL_STATE_SECRET", raising=False)


def options(folder: Path) -> DeployOptions:
    return DeployOptions(store_url=f"sqlite:///{folder}/corral.db")


def names(folder: Path, pattern: str = "*") -> list[str]:
    return [each.name for each in folder.glob(pattern)]


async def run_one(folder: Path, task_id: str) -> str | None:
    """A task of the session `s` that saves a context. Returns what was refused of the context before it."""
    async with open_core(options(folder)) as core:
        await core.store.put_service(ServiceRecord("flow", "{}", 0.0))
        await core.store.create_session(SessionRecord("s"))
        request = ClaimRequest(task_id, "worker", "nonce", 0.0)
        accepted = await core.store.accept(NewTask(task_id, "flow", "{}", 0.0, session_id="s"), request)
        claim = accepted.claim
        assert claim is not None
        if claim.state_error is not None:
            error = ErrorRecord(type="state_refused", message=claim.state_error)
            await core.store.report(
                Report(task_id, claim.epoch, 1, 0.0, terminal=Terminal(TaskStatus.FAILED, error=error))
            )
            return claim.state_error
        update = ContextUpdate(claim.context.version if claim.context else 0, '{"a": 1}')
        ending = Terminal(TaskStatus.COMPLETED, result="1")
        await core.store.report(Report(task_id, claim.epoch, 1, 0.0, terminal=ending, context=update))
        return None


async def test_it_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "corral.db.secret"
    for task in ("one", "two"):
        assert await run_one(tmp_path, task) is None
        content = path.read_text()
        assert len(bytes.fromhex(content)) == 32
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path, "*secret*") == ["corral.db.secret"]
    assert path.read_text() == content


async def test_it_is_missed(tmp_path: Path) -> None:
    await run_one(tmp_path, "one")
    path = tmp_path / "corral.db.secret"
    content = path.read_text()
    path.unlink()
    with pytest.raises(StoreError, match="its secret is gone"):
        await run_one(tmp_path, "two")
    assert not path.exists()
    path.write_text(content)
    with pytest.raises(StoreError, match="Others may read"):
        await run_one(tmp_path, "two")
    path.chmod(0o600)
    assert await run_one(tmp_path, "two") is None
    for damaged in ("", content[:-4], "nonsense"):
        path.write_text(damaged)
        with pytest.raises(StoreError, match="damaged"):
            await run_one(tmp_path, "three")


async def test_what_another_secret_sealed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await run_one(tmp_path, "one")
    old = (tmp_path / "corral.db.secret").read_text().strip()
    monkeypatch.setenv("CORRAL_STATE_SECRET", "a-secret-of-our-own")
    refused = await run_one(tmp_path, "two")
    assert refused is not None
    assert "seal does not fit" in refused
    monkeypatch.setenv("CORRAL_STATE_SECRET", f"a-secret-of-our-own, {old}")
    assert await run_one(tmp_path, "three") is None
    monkeypatch.setenv("CORRAL_STATE_SECRET", "a-secret-of-our-own")
    assert await run_one(tmp_path, "four") is None


async def test_a_store_that_cannot_be_used_leaves_no_secret(tmp_path: Path) -> None:
    (tmp_path / "corral.db").write_text("this is no database, " * 100)
    with pytest.raises(StoreError, match="not an SQLite database"):
        await run_one(tmp_path, "one")
    assert names(tmp_path) == ["corral.db"]


async def test_memory_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_core(DeployOptions(store_url="sqlite://")):
        pass
    assert names(tmp_path) == []


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "corral.db.secret").mkdir()
    with pytest.raises(StoreError, match="secret"):
        await run_one(tmp_path, "one")


@pytest.mark.parametrize("given", ["", " ", "short", "long-enough-for-a-secret,", "long-enough-for-a-secret,short"])
def test_a_secret_that_was_not_filled_in(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("CORRAL_STATE_SECRET", given)
    with pytest.raises(ValueError, match="less than 16") as caught:
        StateSettings()
    assert "long-enough" not in str(caught.value)
