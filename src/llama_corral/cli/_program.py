"""Running a long-lived program from the command line: signals, drain deadline, one-line errors, exit codes."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ..exceptions import CorralError

logger = logging.getLogger(__name__)

STUCK_AFTER = 5.0
"""Seconds beyond the services' drain time after which a program that does not end is ended, with the stacks of what is
stuck in its log (P7)."""


def run_program(
    prepare: Callable[[], Any],
    main: Callable[[Any, Any], Awaitable[int]],
    *,
    drain_timeout: float,
    stuck_after: float = STUCK_AFTER,
) -> int:
    """Prepare, then run `main(prepared, stop)` on Trio until it returns an exit code.

    The first SIGINT or SIGTERM sets `stop`, the second ends the process at once. An error that the operator can mend is one
    line and its hint on stderr.
    """
    import trio

    from ..supervision import EXIT_SETUP

    try:
        prepared = prepare()
        return trio.run(_with_signals, prepared, main, drain_timeout, stuck_after)
    except CorralError as exc:
        return _complain(exc, EXIT_SETUP)
    except BaseExceptionGroup as group:
        known = _only_corral_error(group)
        if known is None:
            raise
        return _complain(known, EXIT_SETUP)


async def _with_signals(
    prepared: Any, main: Callable[[Any, Any], Awaitable[int]], drain_timeout: float, stuck_after: float
) -> int:
    import trio

    from ..supervision import drain_deadline, open_support_group, stop_on_signal

    stop = trio.Event()
    code = 0
    async with open_support_group() as support:
        signals = partial(stop_on_signal, stop, blocked_after=drain_timeout + stuck_after)
        await support.start(signals, name="signals")
        # At the drain time the services cancel what still works; a little later everything is cancelled.
        async with drain_deadline(stop, drain_timeout + 0.2 * stuck_after, margin=0.8 * stuck_after):
            code = await main(prepared, stop)
    return code


class Announcement:
    """The `task_status` of a program's main part: says on stdout that it is ready.

    Args:
        describe: The line, from the value that the part started with.
    """

    def __init__(self, describe: Callable[[Any], str]) -> None:
        self._describe = describe

    def started(self, value: Any = None) -> None:
        # What is loaded by now stays for as long as the process: the collector need not walk it again and again. That is
        # a sixth of a small task's CPU, and the longest pauses. The program decides this, never the library.
        gc.collect()
        gc.freeze()
        print(self._describe(value), flush=True)


def _complain(error: CorralError, code: int) -> int:
    hint = f" ({error.hint})" if error.hint else ""
    print(f"corral: {error}{hint}", file=sys.stderr)
    return code


def _only_corral_error(group: BaseExceptionGroup[BaseException]) -> CorralError | None:
    """The one error in nested groups, if it is ours. Several, or anything else, deserve their tracebacks."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup):
        if len(inner.exceptions) != 1:
            return None
        inner = inner.exceptions[0]
    return inner if isinstance(inner, CorralError) else None
