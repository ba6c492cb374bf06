"""Options that commands share, and arguments as they are written on a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn

import typer

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str,
    typer.Option(
        "--url",
        metavar="URL[,URL...]",
        envvar="CORRAL_URL",
        help="Where the control plane listens, or several of them.",
    ),
]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="CORRAL_TOKEN", help="Its bearer token, if it wants one.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option("-a", "--arg", metavar="KEY=VALUE", help="A value; JSON where it is JSON, else text. Repeatable."),
]
Input = Annotated[str | None, typer.Option("--input", metavar="JSON", help="All values as one JSON object.")]

# Programs that run workflows

Targets = Annotated[
    list[str],
    typer.Argument(metavar="TARGET...", help="[name=]module:attribute or [name=]file.py:attribute of a workflow."),
]
MaxConcurrentTasks = Annotated[int, typer.Option(help="Runs of each service that work at a time.", min=1)]
StepFlavour = Annotated[
    Literal["asyncio", "anyio"],
    typer.Option(help="What async steps speak: asyncio (any library) or anyio (AnyIO, Trio, httpx; faster)."),
]
Checkpoints = Annotated[
    Literal["auto", "every_step", "on_wait", "none"],
    typer.Option(
        help="When a run is stored so that it can go on from there: when it waits and every now and then (auto), after "
        "every step, only when it waits, or never."
    ),
]
IdleTimeout = Annotated[
    float,
    typer.Option(help="Seconds after which a run that waits leaves memory until its event comes; 0: never.", min=0),
]
OnChange = Annotated[
    Literal["resume", "restart", "fail"],
    typer.Option(help="What a run does whose workflow has changed: go on if it fits, begin again, or fail."),
]
DrainTimeout = Annotated[float, typer.Option(help="Seconds that working runs get after a stop.", min=0)]
Debug = Annotated[bool, typer.Option("--debug", help="Keep tracebacks in the records of failed tasks.")]

# Programs with a control plane

Host = Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 means everybody.")]
Port = Annotated[int, typer.Option(help="Port to bind; 0 chooses a free one.", min=0, max=65535)]
StoreUrl = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="CORRAL_STORE_URL",
        help="Where tasks are kept: sqlite:///FILE for one control plane, postgresql://USER@HOST/DATABASE for any number. "
        "A password belongs into CORRAL_STORE_PASSWORD.",
    ),
]
QueueUrl = Annotated[
    str,
    typer.Option(
        "--queue",
        metavar="URL",
        envvar="CORRAL_QUEUE_URL",
        help="The message queue: memory:// (for one control plane), redis://HOST, nats://HOST or amqp://HOST. User and "
        "password belong into CORRAL_QUEUE_USER and CORRAL_QUEUE_PASSWORD.",
    ),
]
OwnToken = Annotated[
    str | None,
    typer.Option("--token", help="Bearer token that clients and workers must send.", envvar="CORRAL_TOKEN"),
]
Retention = Annotated[
    float | None,
    typer.Option(
        help="Seconds that ended tasks are kept; 0 keeps them for ever. If not given: CONTROL_PLANE_RETENTION, or 7 days.",
        min=0,
    ),
]
MaxQueuedTasks = Annotated[
    int | None,
    typer.Option(
        help="Tasks of one service that may wait; more are refused (429). 0: no limit. If not given: "
        "CONTROL_PLANE_MAX_QUEUED_TASKS, or 100,000.",
        min=0,
    ),
]
Heartbeat = Annotated[
    float | None, typer.Option(help="Seconds between two heartbeats of a worker.", min=0.01, hidden=True)
]
Lease = Annotated[
    float | None, typer.Option(help="Seconds without a heartbeat until a worker is lost.", min=0.01, hidden=True)
]
AccessLog = Annotated[bool, typer.Option("--access-log", help="Log one line a request.")]

# Programs with a control plane elsewhere

ControlPlane = Annotated[
    str,
    typer.Option(
        "--control-plane",
        metavar="URL[,URL...]",
        envvar="CORRAL_URL",
        help="Of `corral core` or `corral serve`; of several on one store, the next one is asked when one fails.",
    ),
]
WorkersQueueUrl = Annotated[
    str | None,
    typer.Option(
        "--queue",
        metavar="URL",
        envvar="CORRAL_QUEUE_URL",
        help="The message queue, where the control plane's own URL of it does not work from here. User and password belong "
        "into CORRAL_QUEUE_USER and CORRAL_QUEUE_PASSWORD.",
        show_default="what the control plane says",
    ),
]

# All long-lived programs

StuckAfter = Annotated[
    float, typer.Option(help="Seconds after that until a program that does not end is ended.", min=0, hidden=True)
]
LogFormat = Annotated[Literal["text", "json"], typer.Option(help="What log lines look like.")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="What is logged.")]


def values(arguments: Sequence[str] | None, text: str | None) -> dict[str, Any]:
    """What `--input` and `-a` say together; `-a` wins.

    Raises:
        typer.BadParameter: `--input` is no JSON object; an `-a` has no `=`.
    """
    found: dict[str, Any] = {}
    if text is not None:
        try:
            found = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise typer.BadParameter(f"no JSON: {error}", param_hint="--input") from error
        if not isinstance(found, dict):
            raise typer.BadParameter('no JSON object, such as {"topic": "llamas"}', param_hint="--input")
    for argument in arguments or ():
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{argument!r} is not KEY=VALUE", param_hint="-a")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
