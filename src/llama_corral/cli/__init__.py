"""The command `corral`: parse, call, print.

* `app.py`: the program; each command's module is imported when the command is used, and nothing else is.
* `serve.py`, `core.py`, `worker.py`, `demo.py`: the long-lived programs (`targets.py`, `_program.py`, `_settings.py`).
* `listings.py`, `tasks.py`, `run.py`: what asks a server. `plain_http.py` single requests without the cost of an HTTP
  library; `questions.py` asks the person at the terminal.
* `options.py` what commands share; `output.py` how they print.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the script `corral`."""
    from .app import run

    raise SystemExit(run())
