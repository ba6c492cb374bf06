"""When a run is snapshotted, and what is stored of it.

A snapshot is made in sync code, where the run is between two decisions (`RunHooks`). It costs what the state costs to
encode, so one is made only where the policy wants it and something has changed since the last one.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Final, Literal

from ..protocol.records import Checkpoint
from ..runtime import Run
from .codec import WorkflowCodec
from .sizes import CHECKPOINT_LIMIT, size_of

logger = logging.getLogger(__name__)

CheckpointPolicy = Literal["auto", "every_step", "on_wait", "none"]
"""When a checkpoint is stored. "auto": where the run begins to wait, where it is handed back, and after a step if the last
one is older than 250 ms. "every_step": also after each step, and the next one starts only once it is stored. "on_wait":
where the run waits and is handed back. "none": never; a run that is handed back starts again from its beginning."""

CHECKPOINT_AGE: Final = 0.25
COST_SHARE: Final = 10.0
"""So many times as long as a snapshot took, none is made after a step: what is slow to encode is encoded less often."""


class Checkpointer:
    """Makes the checkpoints of one claimed task.

    Args:
        task_id: For the log.
    """

    def __init__(self, policy: CheckpointPolicy, codec: WorkflowCodec, fingerprint: str, task_id: str) -> None:
        self._policy = policy
        self._codec = codec
        self._fingerprint = fingerprint
        self._task_id = task_id
        self.based_on = 0
        """The version of the session's context that the run's state was made of."""
        self._progress = False
        self._due = time.monotonic() + CHECKPOINT_AGE
        self._cost = 0.0
        # The latest snapshot, as long as nothing can have changed: (ticks of the run, inbox seq), (context, held events).
        self._taken: tuple[tuple[int, int], tuple[str, str]] | None = None
        self._warned = False

    @property
    def each_step(self) -> bool:
        """Whether the next step waits until the checkpoint is stored."""
        return self._policy == "every_step"

    def after_step(self, run: Run, inbox_read: int) -> Checkpoint | None:
        """A checkpoint where one is due after a step that has ended."""
        self._progress = True
        if not self.each_step and (self._policy != "auto" or time.monotonic() < self._due):
            return None
        return self._make(run, inbox_read)

    def on_wait(self, run: Run, inbox_read: int) -> Checkpoint | None:
        """A checkpoint of a run that begins to wait, unless nothing has changed since the last one."""
        if self._policy == "none" or (self._taken is not None and self._taken[0] == _moment(run, inbox_read)):
            return None
        return self._make(run, inbox_read)

    def on_leave(self, run: Run, inbox_read: int, *, idle: bool = False) -> Checkpoint | None:
        """A checkpoint to hand the run back with; None where the stored one stands, if there is one.

        Args:
            idle: The run leaves memory and would go on waiting in it: its workflow's timeout counts on.
        """
        return None if self._policy == "none" else self._make(run, inbox_read, left_idle=idle)

    def forget(self) -> None:
        """The run goes on: the latest snapshot is of no more use."""
        self._taken = None

    def _make(self, run: Run, inbox_read: int, *, left_idle: bool = False) -> Checkpoint | None:
        parts = self._parts(run, inbox_read)
        if parts is None:
            return None
        context, held = parts
        more = LEFT_IDLE if left_idle else ""
        text = f'{{"context":{context},"held":{held},"based_on":{self.based_on}{more}}}'
        if (size := size_of(text)) > CHECKPOINT_LIMIT:
            self._warn(f"its state takes {size} bytes, and a checkpoint at most {CHECKPOINT_LIMIT}")
            return None
        return Checkpoint(text, inbox_read, self._fingerprint, progress=self._progress)

    def _parts(self, run: Run, inbox_read: int) -> tuple[str, str] | None:
        moment = _moment(run, inbox_read)
        if self._taken is not None and self._taken[0] == moment:
            return self._taken[1]
        # Not begun, there is nothing to store. Half sent, it would go on with what a step sent and the step would send it
        # again: what was stored before is better.
        if run.is_done or not moment[0] or run.has_half_sent:
            return None
        began = time.monotonic()
        try:
            held = json.dumps([self._codec.serializer.serialize(event) for event in run.held_events()])
            parts = self._codec.encode_context(run.context), held
        except Exception as exc:  # state that is not JSON, or whatever a user's serializer raises
            self._warn(f"{type(exc).__name__}: {exc}")
            return None
        finally:
            ended = time.monotonic()
            self._due = ended + max(CHECKPOINT_AGE, COST_SHARE * (ended - began))
        self._taken = (moment, parts)
        return parts

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "task %s cannot be checkpointed and starts again from an older checkpoint or its beginning if it is "
                "interrupted: %s",
                self._task_id,
                why,
            )


LEFT_IDLE: Final = ',"left_idle":true'


def _moment(run: Run, inbox_read: int) -> tuple[int, int]:
    return run.statistics().ticks, inbox_read
