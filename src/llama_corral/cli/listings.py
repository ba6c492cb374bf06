"""`corral services`, `sessions`, `tasks`, `dead-letters` and `status`: one question, one table."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import DEFAULT_URL, Json, Token, Url
from .output import moment, print_json, print_table, print_text
from .plain_http import Server

Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at most.")]

_COUNTS = ("held", "queued", "running", "waiting", "instances", "capacity")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (services, sessions, tasks, dead_letters, status):
        app.command(command.__name__.replace("_", "-"))(command)


def services(url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """List the services."""
    found: dict[str, Any] = Server(url, token).get("/services")
    if as_json:
        print_json(list(found.values()))
        return
    rows = [(each["service_name"], each.get("description", "")) for each in found.values()]
    print_table(("SERVICE", "DESCRIPTION"), rows, empty="There are no services.")


def sessions(
    limit: Limit = 100,
    after: Annotated[str | None, typer.Option(help="The session at which the page before this one ended.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """List the sessions, by id. The own sessions of single tasks are not among them."""
    found: dict[str, Any] = Server(url, token).get("/sessions", limit=limit, after=after)
    if as_json:
        print_json(list(found.values()))
        return
    rows = [(each["session_id"], len(each["task_ids"]), each["state"]) for each in found.values()]
    print_table(("ID", "TASKS", "STATE"), rows, empty="There are no sessions.")


def tasks(
    status: Annotated[
        list[str] | None,
        typer.Option(help="held, queued, running, waiting, completed, failed, cancelled or timed_out. Repeatable."),
    ] = None,
    service: Annotated[str | None, typer.Option(help="Of this service only.")] = None,
    session: Annotated[str | None, typer.Option(help="Of this session only.")] = None,
    before: Annotated[str | None, typer.Option(help="The task at which the page before this one ended.")] = None,
    limit: Limit = 20,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """List tasks, newest first."""
    page = Server(url, token).get(
        "/tasks", status=status or None, service=service, session_id=session, before=before, limit=limit
    )
    found: list[dict[str, Any]] = page["tasks"]
    if as_json:
        print_json(found)
        return
    columns = ["TASK", "SERVICE", "STATUS", "EVENTS", "CREATED"]
    rows = [
        [each["task_id"], each["service_name"], each["status"], each["event_count"], moment(each["created_at"])]
        for each in found
    ]
    if any(each["error"] for each in found):
        columns.append("ERROR")
        for row, each in zip(rows, found, strict=True):
            error = each["error"]
            row.append(f"{error['type']}: {error['message']}" if error else None)
    print_table(columns, rows, empty="There are no such tasks.")


def dead_letters(
    limit: Limit = 20,
    before: Annotated[int | None, typer.Option(help="The number at which the page before this one ended.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """List messages that nobody could read or handle, newest first. With --json: the messages too."""
    found: list[dict[str, Any]] = Server(url, token).get("/dead_letters", before=before, limit=limit)["dead_letters"]
    if as_json:
        print_json(found)
        return
    rows = [(each["no"], moment(each["at"]), each["topic"], each["reason"]) for each in found]
    print_table(("NO", "AT", "TOPIC", "REASON"), rows, empty="There are no dead letters.")


def status(url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """How much waits and runs, by service."""
    found = Server(url, token).get("/status")
    if as_json:
        print_json(found)
        return
    print_text(f"{url} is {'draining' if found['draining'] else 'up'}")
    rows = [(name, *(counts.get(each, 0) for each in _COUNTS)) for name, counts in found["services"].items()]
    print_table(("SERVICE", *map(str.upper, _COUNTS)), rows, empty="There are no services.")
