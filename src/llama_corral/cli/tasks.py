"""`corral events`, `send`, `cancel` and `retry`: what can be done to a task by its id."""

from __future__ import annotations

from typing import Annotated

import typer

from ..client.outgoing import event_text
from ..http_urls import path_of
from .options import DEFAULT_URL, Arguments, Input, Json, Token, Url, values
from .output import print_json, print_text
from .plain_http import Server

TaskId = Annotated[str, typer.Argument(metavar="TASK", help="The id of the task.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (events, send, cancel, retry):
        app.command(command.__name__)(command)


def events(
    task: TaskId,
    start: Annotated[int, typer.Option("--from", min=0, help="Index of the first event wanted.")] = 0,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show the events of a task as they come, until it has ended.

    With --json: one line an event, then one with the record of the ending. The exit code is 0 however the task ended.
    """
    from .run import show_events

    raise typer.Exit(show_events(url, token, task, start, as_json=as_json))


def send(
    task: TaskId,
    event_type: Annotated[str, typer.Argument(metavar="EVENT", help="The name of the event's type.")],
    arguments: Arguments = None,
    text: Input = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Send an event to a task, whether it waits for one already or not.

    For example: corral send TASK HumanResponseEvent -a response=yes
    """
    body = {"agent_id": "", "event_obj_str": event_text(event_type, values(arguments, text))}
    Server(url, token).post(path_of("tasks", task, "send_event"), body)
    if as_json:
        print_json({"task_id": task, "event": event_type, "sent": True})
    else:
        print_text(f"sent {event_type} to {task}")


def cancel(task: TaskId, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Cancel a task. Its record says cancelled when its run has ended."""
    answer = Server(url, token).post(path_of("tasks", task, "cancel"))
    if as_json:
        print_json(answer)
    else:
        print_text(f"{task} is cancelled" if answer["ended"] else f"{task} has been told to cancel")


def retry(
    task: TaskId,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="From the beginning, also where a checkpoint was left.")
    ] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Do again, as a new task, what an ended task did not complete.

    It goes on where the other one left a checkpoint. The same command again is the same task.
    """
    answer = Server(url, token).post(path_of("tasks", task, "retry"), fresh="true" if fresh else None)
    if as_json:
        print_json(answer)
    else:
        already = "" if answer["created"] else f" already: {answer['status']}"
        print_text(f"{answer['task_id']} does {task} again{already}")
