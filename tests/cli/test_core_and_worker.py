"""`corral core` and `corral worker`: what an operator can mend is one line. How they work is in `tests/processes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_corral.cli.app import run

from .test_serve import HELLO, refused, serving
from .test_serve import run as run_process

pytestmark = pytest.mark.process


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("core", "--retention", "-1"), "--retention"),
        (("core", "--max-queued-tasks", "many"), "--max-queued-tasks"),
        (("worker",), "TARGET"),
        (("worker", HELLO, "--checkpoints", "often"), "'often' is not one of"),
        (("worker", HELLO, "--on-change", "shrug"), "--on-change"),
        (("worker", HELLO, "--idle-timeout", "-1"), "--idle-timeout"),
    ],
)
def test_a_wrong_option(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str) -> None:
    assert run(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("CORRAL_STATE_SECRET", "too-short", "state_secret"),
        ("CONTROL_PLANE_LEASE", "a while", "lease"),
        ("CONTROL_PLANE_RETENTION", "-3", "retention"),
    ],
)
def test_a_wrong_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run(("core", "--port", "0", "--store", "sqlite://"))
    assert ended.value.code == 78
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert value not in lines[0]


@pytest.mark.promise("P9")
def test_a_core_that_cannot_start(tmp_path: Path) -> None:
    with serving(tmp_path, HELLO) as (process, url):
        port = url.rpartition(":")[2]
        refused(run_process("core", "--port", "0", folder=tmp_path), str(process.pid))
        refused(run_process("core", "--port", port, "--store", "sqlite://", folder=tmp_path), "in use")
        (tmp_path / "corral.db.secret").chmod(0o644)
    refused(run_process("core", "--port", "0", folder=tmp_path), "Others may read", "chmod 600")
    for command in (("core",), ("serve", HELLO)):
        options = ("--port", "0", "--store", "sqlite://", "--queue", "redis://ada:hunter2@host:nonsense")
        refused(run_process(*command, *options, folder=tmp_path), "queue URL cannot be read")
        refused(run_process(*command, "--store", "mysql://ada:hunter2@host/db", folder=tmp_path), "'mysql'")


@pytest.mark.promise("P9")
def test_a_worker_that_cannot_start(tmp_path: Path) -> None:
    refused(run_process("worker", "nonsense", folder=tmp_path), "'nonsense' is no target")
    refused(run_process("worker", HELLO, "--control-plane", "nonsense", folder=tmp_path), "not a URL")
    refused(run_process("worker", HELLO, "--control-plane", "http://me:pw@host", folder=tmp_path), "password")
    refused(run_process("worker", HELLO, "--queue", "memory://", folder=tmp_path), "inside one process")
    refused(run_process("worker", HELLO, "--queue", "kafka://ada:hunter2@host", folder=tmp_path), "'kafka'")
