"""What the programs of this project take: command lines, and variables of the environment."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import typer
from pydantic_settings import BaseSettings

import llama_corral
from llama_corral.cli.app import COMMANDS, app


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command of a command line and all its values, without running it.

    Raises:
        Exception: typer's, for what there is not.
    """
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    with group.make_context("corral", [name, *rest]) as context:
        command = group.get_command(context, name)
        assert command is not None, f"there is no command {name!r}"
        with command.make_context(name, rest, parent=context) as own:
            return name, own.params


def options() -> set[str]:
    """All options of all commands: `--port`, ..."""
    return {option for parameter in _parameters() for option in (*parameter.opts, *parameter.secondary_opts)}


def variables() -> set[str]:
    """All variables of the environment that are read."""
    found = {name for parameter in _parameters() for name in _names(getattr(parameter, "envvar", None))}
    for module in pkgutil.walk_packages(llama_corral.__path__, "llama_corral."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for kind in _settings(BaseSettings):
        prefix = kind.model_config.get("env_prefix", "")
        found |= {f"{prefix}{field}".upper() for field in kind.model_fields}
    return found


def _parameters() -> Iterator[Any]:
    group: Any = typer.main.get_command(app)
    with group.make_context("corral", [], resilient_parsing=True) as context:
        yield from group.params
        for name in COMMANDS:
            yield from group.get_command(context, name).params


def _names(envvar: str | Sequence[str] | None) -> Sequence[str]:
    return [envvar] if isinstance(envvar, str) else envvar or ()


def _settings(kind: type[BaseSettings]) -> Iterator[type[BaseSettings]]:
    for one in kind.__subclasses__():
        if one.__module__.startswith("llama_corral."):
            yield one
        yield from _settings(one)
