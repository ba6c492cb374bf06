"""The program: commands by name, imported when they are used; errors as one line; exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from .. import __version__
from ..exceptions import CorralError, UsageError
from .output import EXIT_CANCELLED, EXIT_FAILURE, EXIT_USAGE, complain

COMMANDS: Final = {
    "serve": ("serve", "Serve workflows: control plane, queue, services and store in one process."),
    "core": ("core", "Run control plane, queue and store, for workers in other processes."),
    "worker": ("worker", "Run workflows for a control plane in another process."),
    "demo": ("demo", "Digest texts through the whole system, in one process."),
    "run": ("run", "Run a service: stream its events, answer its questions, print its result."),
    "services": ("listings", "List the services."),
    "sessions": ("listings", "List the sessions."),
    "tasks": ("listings", "List tasks, newest first."),
    "dead-letters": ("listings", "List messages that nobody could handle, newest first."),
    "status": ("listings", "Which control planes are up, how much waits and runs."),
    "events": ("tasks", "Show the events of a task as they come."),
    "send": ("tasks", "Send an event to a task."),
    "cancel": ("tasks", "Cancel a task."),
    "retry": ("tasks", "Do again what an ended task did not complete."),
}
"""Name: the module that registers it, and its line in the help, so that the help imports none of them."""

# What typer raises for a wrong command line. It brings its own copy of click since 0.27, so the classes are found from
# the one that has a public name.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = _UsageError.__mro__[1]


class _LazyGroup(TyperGroup):
    """Commands that are imported when they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{COMMANDS[cmd_name][0]}", __package__)
        app = _new_app()
        module.register(app)
        return typer.main.get_group(app).commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _new_app(**options: Any) -> typer.Typer:
    # No rich markup and no boxes: help and errors stay greppable, and an error is one line.
    return typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, **options)


app = _new_app(cls=_LazyGroup, help="Run llama-index workflows as services.")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"corral {__version__}")
        raise typer.Exit


@app.callback()
def corral(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Run llama-index workflows as services."""


def run(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors that somebody can mend are one line on stderr."""
    given = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to fail
    try:
        code = typer.main.get_command(app).main(args=given or ["--help"], prog_name="corral", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "corral"
        return complain(error.format_message(), f"Try '{path} --help'.", EXIT_USAGE)
    except _ClickException as error:
        return complain(error.format_message(), None, EXIT_FAILURE)
    except CorralError as error:
        return complain(str(error), error.hint, EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_CANCELLED
    except BrokenPipeError:
        # Whoever read our output has left (`| head`). The interpreter must not trip over it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
