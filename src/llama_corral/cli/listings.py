"""`corral services`, `sessions`, `tasks`, `dead-letters` and `status`: one question, one table."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..exceptions import Unavailable
from ..http_urls import check_urls
from .options import DEFAULT_URL, Json, Token, Url
from .output import EXIT_FAILURE, complain, duration, moment, print_json, print_table, print_text
from .plain_http import Server

Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at most.")]

_COUNTS = {
    "instances": "INSTANCES",
    "capacity": "CAPACITY",
    "running": "WORKING",
    "waiting": "WAITING",
    "queued": "QUEUED",
    "held": "HELD",
}
"""What an answer says of a service, and how its column is named."""


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
    """Which control planes are up, and how much waits and runs, by service.

    Working are tasks in a step, waiting those that wait for an event or a timer; queued ones wait for a free slot, held ones
    for their turn in a session. Oldest: for how long the first queued one could have started. Exit code 0 if a control
    plane is up, else 1.
    """
    states: dict[str, str] = {}
    found: dict[str, Any] = {}
    errors: list[Unavailable] = []
    for each in check_urls(url):
        try:
            answer = Server(each, token).get("/status")
        except Unavailable as error:
            states[each] = "away"
            errors.append(error)
        else:
            states[each] = "draining" if answer["draining"] else "up"
            # They all know the same, from one store.
            found = answer if not found or found["draining"] else found
    if as_json:
        print_json({"urls": states, "services": {}, **found})
    elif found:
        for each, state in states.items():
            print_text(f"{each} is {state}")
        print_text(f"store: {found.get('store') or 'unknown'}, queue: {found.get('queue') or 'unknown'}")
        rows = [
            (name, *(counts.get(key, 0) for key in _COUNTS), duration(counts.get("oldest_queued")))
            for name, counts in found["services"].items()
        ]
        print_table(("SERVICE", *_COUNTS.values(), "OLDEST"), rows, empty="There are no services.")
    for away in errors:
        complain(str(away), away.hint, EXIT_FAILURE)
    if "up" not in states.values():
        raise typer.Exit(EXIT_FAILURE)
