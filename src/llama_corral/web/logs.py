"""Logs that name the request and the task they are about, as text or as JSON.

The library only writes to loggers below `llama_corral`; handlers are set up by whoever owns the process, for instance
with `configure_logging`.
"""

from __future__ import annotations

import json
import logging
import time
from typing import IO, Literal

from ..log_ids import REQUEST_ID, TASK_ID

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id", "task_id", "taskName"}


class _Ids(logging.Filter):
    """Puts the ids on every record, unless the record already has them from `extra`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.setdefault("request_id", REQUEST_ID.get())
        record.__dict__.setdefault("task_id", TASK_ID.get())
        return True


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s%(ids)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        known = ((key, record.__dict__.get(f"{key}_id", "-")) for key in ("request", "task"))
        record.__dict__["ids"] = "".join(f" {key}={value}" for key, value in known if value != "-")
        return super().format(record)


class _JsonFormatter(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key in ("request_id", "task_id"):
            if record.__dict__.get(key, "-") != "-":
                entry[key] = record.__dict__[key]
        entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD and key != "ids"}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(
    log_format: Literal["text", "json"] = "text",
    level: int | str = logging.INFO,
    stream: IO[str] | None = None,
) -> logging.Handler:
    """Send the logs of llama_corral to `stream` (standard error), replacing what an earlier call set up."""
    handler = logging.StreamHandler(stream)
    handler.set_name("llama_corral")
    handler.addFilter(_Ids())
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logger = logging.getLogger("llama_corral")
    for old in [known for known in logger.handlers if known.get_name() == "llama_corral"]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    return handler
