"""Where a PostgreSQL server is, how it is reached, and what its errors mean to whoever reads them."""

from __future__ import annotations

import math
import os
import re
import struct
import time
from collections.abc import Generator, Mapping
from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors
from psycopg.adapt import Dumper
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.numeric import Int8BinaryDumper

from ..exceptions import BadInput, CorralError, StoreError, StoreUnavailable
from .transaction import Durability, Row

T = TypeVar("T")

ANSWER_TIME: Final = 70.0
"""Seconds after which a server that is connected and says nothing is given up. Longer than `statement_timeout`, by which one
that lives says something."""

# What the URL says otherwise stays as it says. `tcp_user_timeout` is in milliseconds.
_PARAMETERS: Final[Mapping[str, str]] = {
    "application_name": "llama-corral",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "target_session_attrs": "read-write",
}
_SETTINGS: Final[Mapping[str, str]] = {
    # A control plane that stands still in a transaction loses it, and others wait a little less for its locks to go.
    "idle_in_transaction_session_timeout": "10s",
    "lock_timeout": "3s",
    "statement_timeout": "60s",
    # The server's side of the same: what a vanished control plane had locked is free again.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "15s",
    "extra_float_digits": "1",
    # Every question has its index. A plan outlives the time when the table was small.
    "enable_seqscan": "off",
    "jit": "off",
}
_SET: Final = """
SELECT set_config(name, wanted, false) FROM unnest(%(names)s::TEXT[], %(wanted)s::TEXT[]) AS ours (name, wanted)
"""
# What the operator chose may be more than "on"; only less is too little.
_SET_FULL: Final = """
SELECT set_config('synchronous_commit', 'on', false)
WHERE current_setting('synchronous_commit') IN ('off', 'local')
"""

_URL_HINT: Final = (
    "Write postgresql://user:password@host:5432/database; in user and password, write special characters as %XX."
)
_HINTS: Final[tuple[tuple[str, str], ...]] = (
    ("password authentication failed", "Check user and password in the URL of the store."),
    ("no password supplied", "Give the password in the URL of the store, or in PGPASSWORD."),
    ("does not exist", "Create it, or name another one in the URL of the store."),
    ("pg_hba.conf", "Let this user in from this address in the server's pg_hba.conf, or use TLS (?sslmode=require)."),
    ("too many", "Raise the server's max_connections: each control plane has two."),
    ("starting up", "Wait until the server is ready."),
    ("shutting down", "Start the server again."),
    ("read-only", "Name the primary server in the URL of the store: this one only reads."),
    ("certificate", "Check sslmode and sslrootcert in the URL of the store."),
)
_BY_STATE: Final[Mapping[str, str]] = {
    "53100": "Free some space on the disk of the server.",
    "42501": "Give the user of the store's URL the rights to create and use tables in this schema.",
    "25006": "Name the primary server in the URL of the store: this one only reads.",
    "42P01": "The tables of the store are gone: restore them from a backup, or start with an empty database.",
    "55P03": "Another program keeps a lock on the store; see pg_stat_activity on the server.",
}


class Number(Dumper):
    """A float as text of no type: the statement says what it is. So a statement is prepared once, and not once for every
    mix of values and NULLs."""

    def dump(self, obj: float) -> bytes:
        return repr(obj).encode()


class Link(psycopg.Connection[Row]):
    """A connection that gives up a server which does not answer, as a stopped one or one behind a cut cable does not.

    Attributes:
        patience: Seconds that one answer may take.
        ends_at: When every wait ends, by the monotonic clock.
    """

    patience = ANSWER_TIME
    ends_at = math.inf

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        began = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                # Nothing is ready several times a second, however long nothing comes.
                if not ready and time.monotonic() > min(began + self.patience, self.ends_at):
                    self.close()
                    raise psycopg.OperationalError("the server does not answer")
                wanted = gen.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result


class Server:
    """Where a URL leads. Its password is told to nobody but the server.

    Raises:
        StoreError: it cannot be read.
    """

    def __init__(self, url: str, durable: Durability) -> None:
        self._parameters = {**_PARAMETERS, **_parse(url), "client_encoding": "utf8"}
        chosen = f"{self._parameters.get('options')} {os.environ.get('PGOPTIONS')}"
        self._settings = {name: value for name, value in _SETTINGS.items() if name not in chosen}
        self._durable = durable

    def connect(self) -> Link:
        """A new connection. Raises psycopg.Error, see `why`."""
        # 100 prepared statements are psycopg's limit otherwise; there are as many as `Statements` has, and no more.
        link = Link.connect(**self._parameters, autocommit=True, prepare_threshold=2)
        try:
            link.prepared_max = None
            link.adapters.register_dumper(int, Int8BinaryDumper)
            link.adapters.register_dumper(float, Number)
            link.execute(_SET, {"names": list(self._settings), "wanted": list(self._settings.values())})
            if self._durable == "full":
                link.execute(_SET_FULL)
        except BaseException:
            link.close()
            raise
        return link

    def why(self, error: psycopg.Error) -> str:
        """What the error says, on one line and without the password."""
        text = error.diag.message_primary or str(error)
        # The lines of libpq that are indented say what else may be the matter.
        text = " ".join(line.strip() for line in text.splitlines() if not line.startswith("\t"))
        password = self._parameters.get("password")
        if password:
            text = text.replace(str(password), "***")
        return text if len(text) <= 400 else text[:400] + "..."

    def unusable(self, error: psycopg.Error) -> StoreError:
        """Why the store cannot be opened."""
        return StoreError(
            f"The store cannot be used: {self.why(error)}",
            hint=hint_of(error) or "Is the server running there, and are host, port and database right?",
        )

    def translate(self, error: Exception) -> CorralError | None:
        """What a caller is told of an error of psycopg; None where it is a fault of ours."""
        if isinstance(error, (psycopg.DataError, errors.ProgramLimitExceeded)):
            # NUL in a text, a number beyond 64 bits, a key that is too long for an index.
            return BadInput(f"A value cannot be stored: {self.why(error)}")
        if isinstance(
            error, (UnicodeEncodeError, OverflowError, struct.error)
        ):  # a lone surrogate, a number beyond 64 bits
            return BadInput(f"A value cannot be stored: {error}")
        if isinstance(error, psycopg.IntegrityError) or not isinstance(error, psycopg.Error):
            return None
        return StoreUnavailable(f"The store failed: {self.why(error)}", hint=hint_of(error))

    def __repr__(self) -> str:
        return "Server(...)"


def hint_of(error: psycopg.Error) -> str | None:
    known = _BY_STATE.get(error.sqlstate or "")
    if known is not None:
        return known
    # The state of a refused connection is in its text alone.
    text = str(error)
    return next((hint for words, hint in _HINTS if words in text), None)


def _parse(url: str) -> dict[str, Any]:
    """libpq repeats in its messages what it cannot read, and takes a part of a password that is not encoded for a host or a
    port, which it repeats too: neither is let through."""
    refused = StoreError("The URL of the store cannot be read.", hint=_URL_HINT)
    before_options = url.partition("?")[0]
    if before_options.count("@") > 1 or re.search(r"[/#].*@", before_options.partition("//")[2]):
        raise refused
    try:
        parameters = conninfo_to_dict(url)
    except psycopg.Error:
        raise refused from None
    port = str(parameters.get("port") or "")
    if not re.fullmatch(r"[0-9,]*", port):
        raise refused
    return dict(parameters)
