"""What commands print, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from llama_corral import __version__
from llama_corral.cli.options import values
from llama_corral.cli.output import printable
from llama_corral.cli.questions import prompt_of
from llama_corral.client import SyncClient, TaskEvent
from llama_corral.protocol.messages import new_id

Corral = Callable[..., "Ended"]  # type: ignore[name-defined]  # noqa: F821 - of the conftest


@pytest.fixture(autouse=True)
def _no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions find the input ended."""
    monkeypatch.setattr("llama_corral.cli.questions.os.read", lambda *_: b"")


def test_version_and_help(corral: Corral) -> None:
    assert corral("--version").out == f"corral {__version__}\n"
    for arguments in ((), ("--help",)):
        shown = corral(*arguments)
        assert shown.code == 0
        assert "services" in shown.out
    for command in (
        "run",
        "services",
        "sessions",
        "tasks",
        "status",
        "events",
        "send",
        "cancel",
        "retry",
        "dead-letters",
    ):
        assert corral(command, "--help").code == 0


def test_run_prints_the_result(corral: Corral, server: str) -> None:
    ended = corral("run", "hello", "-a", "name=Ada")
    assert (ended.code, ended.out, ended.err) == (0, "Hello, Ada!\n", "")
    ended = corral("run", "ticking", "--input", '{"events": 1}', "-a", "events=2")
    assert ended.code == 0
    first, second, *result = ended.out.splitlines()
    assert [first.split(maxsplit=2), second.split(maxsplit=2)] == [
        ["0", "Tick", '{"number": 0}'],
        ["1", "Tick", '{"number": 1}'],
    ]
    assert json.loads("\n".join(result)) == {"events": 2, "answer": None}


def test_run_as_json(corral: Corral, server: str) -> None:
    ended = corral("run", "ticking", "-a", "events=1", "--json")
    tick, stop, record = ended.lines
    assert tick == {"index": 0, "type": "Tick", "data": {"number": 0}}
    assert stop["type"] == "StopEvent"
    assert record["status"] == "completed"
    assert record["result"] == {"events": 1, "answer": None}
    assert ended.err == ""


def test_a_failure(corral: Corral, server: str) -> None:
    ended = corral("run", "ticking", "-a", "fail=true")
    assert ended.code == 1
    assert ended.out == ""
    assert "ValueError: as you wish" in ended.err
    assert ended.err.count("\n") == 1
    ended = corral("run", "ticking", "-a", "fail=true", "--json")
    assert ended.code == 1
    assert ended.lines[-1]["status"] == "failed"
    assert ended.lines[-1]["error"]["message"] == "as you wish"
    ended = corral("run", "ticking", "-a", "hold=true", "--timeout", "0.1")
    assert ended.code == 1
    assert "did not end before its deadline" in ended.err


def test_a_session(corral: Corral, server: str, client: SyncClient) -> None:
    session = client.sessions.create()
    session.update_state(colour="grün")
    for count in ("1", "2"):
        assert corral("run", "counter", "--session", session.id).out.endswith(f"{count}\n")
    (found,) = [each for each in corral("sessions", "--json").json if each["session_id"] == session.id]
    assert len(found["task_ids"]) == 2
    assert '{"colour": "grün"}' in corral("sessions").out
    tasks = corral("tasks", "--session", session.id, "--status", "completed", "--service", "counter", "--json").json
    assert [task["task_id"] for task in tasks] == found["task_ids"][::-1]
    assert found["task_ids"][0] in corral("tasks", "--session", session.id).out
    assert corral("tasks", "--session", session.id, "--status", "failed").err == "There are no such tasks.\n"


def test_services_and_status(corral: Corral, server: str) -> None:
    listed = corral("services")
    assert listed.out.startswith("SERVICE  DESCRIPTION\ncounter  Takes `by`")
    assert "\x1b" not in listed.out
    assert corral("services", "--json").json[0]["service_name"] == "counter"
    assert corral("status").out.startswith(f"{server} is up\nstore: sqlite, queue: memory\nSERVICE  INSTANCES")
    assert "hello" in corral("status", "--json").json["services"]


def test_events_send_cancel(corral: Corral, server: str, client: SyncClient) -> None:
    task = client.start("ticking", events=1, hold=True)
    assert corral("send", task.id, "HumanResponseEvent", "-a", "response=yes").code == 0
    assert task.result()["answer"] == "yes"
    shown = corral("events", task.id)
    assert (shown.code, shown.err) == (0, f"{task.id}: completed\n")
    assert [line.split()[:2] for line in shown.out.splitlines()][:2] == [["0", "Tick"], ["1", "InputRequiredEvent"]]
    *events, record = corral("events", task.id, "--from", "1", "--json").lines
    assert [event["index"] for event in events] == list(range(1, 1 + len(events)))
    assert record["status"] == "completed"
    again = corral("send", task.id, "HumanResponseEvent", "--input", '{"response": "late"}', "--json")
    assert (again.code, again.out) == (2, "")

    task = client.start("stuck")
    assert corral("cancel", task.id, "--json").json["task_id"] == task.id
    assert task.wait(10).status == "cancelled"
    assert corral("cancel", task.id).code == 2


@pytest.mark.promise("P2")
def test_failed_tasks_are_listed_and_done_again(corral: Corral, server: str, client: SyncClient) -> None:
    name = new_id()
    session = client.sessions.create().id
    assert corral("run", "flaky", "-a", f"name={name}", "-a", "failures=1", "--session", session).code == 1
    listed = corral("tasks", "--status", "failed", "--session", session)
    header, row = listed.out.splitlines()
    task = row.split()[0]
    assert header.endswith("ERROR")
    assert row.endswith("ConnectionResetError: attempt 1")
    again = corral("retry", task, "--json").json
    assert (again["retry_of"], again["session_id"]) == (task, session)
    assert corral("retry", task, "--fresh").out.startswith(f"{again['task_id']} does {task} again already: ")
    assert client.task(again["task_id"]).result(timeout=10) == 2
    assert corral("retry", task).out == f"{again['task_id']} does {task} again already: completed\n"
    assert "ERROR" not in corral("tasks", "--status", "completed", "--session", session).out
    refused = corral("retry", again["task_id"])
    assert (refused.code, refused.out) == (2, "")
    assert "completed" in refused.err


def test_options_of_a_run(corral: Corral, server: str, client: SyncClient) -> None:
    session = client.sessions.create().id
    options = ("--delay", "0.05", "--max-attempts", "7", "--retry-on", "A", "--retry-on", "b.C", "--backoff", "0.5")
    assert corral("run", "hello", "--session", session, *options).code == 0
    (info,) = client.tasks(session=session)
    assert info.max_attempts == 7
    assert info.started_at is not None
    assert info.started_at >= info.created_at + 0.05
    refused = corral("run", "hello", "--backoff", "1")
    assert (refused.code, refused.out) == (2, "")
    assert "no error after which" in refused.err


def test_dead_letters(corral: Corral, server: str, client: SyncClient) -> None:
    assert corral("dead-letters").err == "There are no dead letters.\n"
    publish = {"type": "hello", "data": {"no": "ticket"}}
    with httpx.Client(base_url=server) as plain:
        plain.post("/messages/llama_deploy.hello", json=publish).raise_for_status()
    while not (found := corral("dead-letters", "--json").json):
        pass
    assert found[0]["message"]["data"] == {"no": "ticket"}
    shown = corral("dead-letters", "--limit", "1").out.splitlines()
    assert shown[0].split() == ["NO", "AT", "TOPIC", "REASON"]
    assert shown[1].endswith("llama_deploy.hello  no ticket of this service")


def test_no_more_input(corral: Corral, server: str) -> None:
    ended = corral("run", "ticking", "-a", "hold=true", "--timeout", "0.5")
    assert "Go on?" in ended.err
    assert "no more input; answer with: corral send" in ended.err


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("run", "nobody"), 2, "no service 'nobody'"),
        (("run", "counter", "-a", "by=many"), 2, "by"),
        (("run", "counter", "-a", "by"), 2, "'by' is not KEY=VALUE"),
        (("run", "counter", "--input", "[1]"), 2, "no JSON object"),
        (("run", "counter", "--input", "{"), 2, "no JSON"),
        (("run", "hello", "--session", "nowhere"), 2, "no session 'nowhere'"),
        (("run",), 2, "Missing argument"),
        (("run", "hello", "--lots"), 2, "--lots"),
        (("herd",), 2, "herd"),
        (("events", "nothing"), 2, "task 'nothing'"),
        (("cancel", "nothing"), 2, "task 'nothing'"),
        (("retry", "nothing"), 2, "task 'nothing'"),
        (("run", "hello", "--max-attempts", "0"), 2, "max_attempts"),
        (("run", "hello", "--delay", "-1"), 2, "delay"),
        (("send", "nothing", "E"), 2, "task 'nothing'"),
        (("tasks", "--status", "lost"), 2, "status"),
        (("status", "--url", "nonsense"), 2, "not a URL"),
        (("run", "hello", "--url", "http://me:secret@host"), 2, "user or a password"),
        (("status", "--url", "http://127.0.0.1:1"), 1, "no answer from http://127.0.0.1:1"),
        (("run", "hello", "--url", "http://127.0.0.1:1"), 1, "no answer from http://127.0.0.1:1"),
        (("events", "task", "--url", "http://127.0.0.1:1"), 1, "no answer from http://127.0.0.1:1"),
        (("run", "hello", "--token", "a\nb"), 2, "no header can carry"),
        (("status", "--token", "a\nb"), 2, "no header can carry"),
    ],
)
def test_an_error_is_one_line(corral: Corral, server: str, arguments: tuple[str, ...], code: int, says: str) -> None:
    ended = corral(*arguments)
    assert (ended.code, ended.out) == (code, "")
    assert says in ended.err
    assert ended.err.startswith("corral: ")
    assert ended.err.count("\n") == 1
    assert "secret" not in ended.err


def test_tokens(corral: Corral, locked_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_URL", locked_url)
    for command in (("status",), ("run", "hello")):
        refused = corral(*command)
        assert refused.code == 2
        assert "token is missing" in refused.err
        assert corral(*command, "--token", "wrong").code == 2
        assert corral(*command, "--token", "sesäme").code == 2
        assert corral(*command, "--token", "sesame").code == 0
    monkeypatch.setenv("CORRAL_TOKEN", "sesame")
    assert corral("status").code == 0
    assert "sesame" not in corral("status", "--help").out


def test_values() -> None:
    given = ["a=1", "b=x=y", "c=[1]", "d=", "e=NaN", 'f="1"', "g=true"]
    assert values(given, '{"a": 0, "z": null}') == {
        "a": 1, "z": None, "b": "x=y", "c": [1], "d": "", "e": "NaN", "f": "1", "g": True,
    }  # fmt: skip


def test_nothing_drives_the_terminal() -> None:
    assert printable("a\x1b[31m\x9b\r\n\tb") == "a\\x1b[31m\\x9b\\x0d\n\tb"


@pytest.mark.parametrize(
    ("kind", "data", "prompt"),
    [
        ("InputRequiredEvent", {"prefix": "Go\non?"}, "Go on?"),
        ("app.MyInputRequiredEvent", {}, "app.MyInputRequiredEvent:"),
        ("Question", {"prefix": "Name?", "field": "name"}, "Name?"),
        ("Question", {"prefix": 3}, None),
        ("Log", {"message": "hello"}, None),
        ("InputRequiredEvent", {"message": "hello"}, "hello"),
    ],
)
def test_which_events_ask(kind: str, data: dict[str, object], prompt: str | None) -> None:
    assert prompt_of(TaskEvent(0, kind, data)) == prompt
