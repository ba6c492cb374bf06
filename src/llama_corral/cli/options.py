"""Options that commands share, and arguments as they are written on a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="CORRAL_URL", help="Where the control plane listens.")]
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
