"""Where a Redis server is, who we are there, and how a connection to it is opened."""

from __future__ import annotations

import math
import socket
import ssl
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import anyio
import anyio.abc
from anyio.lowlevel import checkpoint_if_cancelled
from coredis.connection import BaseConnection, Location, TCPLocation
from coredis.connection import UnixDomainSocketLocation as UnixLocation
from coredis.exceptions import RedisError
from pydantic import SecretStr

from ..exceptions import SetupError
from .urls import credentials_of, hosts_of

CONNECT_TIME: Final = 5.0
"""Seconds for a connection to be opened."""
CLIENT_NAME: Final = "llama-corral"

_DEFAULT_PORT: Final = 6379
_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class RedisAddress:
    """Where a server is and who we are there. `str` and `repr` say nothing secret."""

    host: str = "localhost"
    port: int = _DEFAULT_PORT
    db: int = 0
    path: str | None = None
    """Of a Unix socket, in place of host and port."""
    user: str | None = None
    password: SecretStr | None = None
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """From `redis://user:password@host:port/db`; `rediss://` is TLS, `unix:///path?db=0` a Unix socket. Options of
        TLS are called as in other clients: ssl_ca_certs, ssl_certfile, ssl_keyfile (paths), ssl_cert_reqs (required or
        none), ssl_check_hostname (true or false).

        Raises:
            SetupError: something in it cannot be used. The text never repeats the URL.
        """
        user, password = credentials_of(url)
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        is_unix = parts.scheme == "unix"
        db = options.pop("db", "0" if is_unix else parts.path.strip("/") or "0")
        tls = _tls({name: options.pop(name) for name in _TLS_OPTIONS if name in options}, parts.scheme)
        if options:
            raise SetupError(
                f"A Redis queue has no option {min(options)!r}",
                hint="Its options are lease, max_messages, patience, broadcast_buffer, db and, with rediss://, "
                + ", ".join(_TLS_OPTIONS)
                + ".",
            )
        if not (db.isascii() and db.isdigit()):
            raise SetupError("The database of a Redis URL must be a number", hint="Write redis://host:port/0.")
        if is_unix and not parts.path:
            raise SetupError("The Redis URL names no socket", hint="Write unix:///path/of/the/socket.")
        if len(hosts_of(parts)) > 1:
            raise SetupError("The Redis URL names several servers", hint="Write redis://host:port: one of them.")
        host = parts.hostname or "localhost"
        try:
            host.encode("idna")
        except UnicodeError:
            raise SetupError("The host of the Redis URL is no name of a host") from None
        return cls(
            host=host,
            port=parts.port or _DEFAULT_PORT,
            db=int(db),
            path=unquote(parts.path) if is_unix else None,
            user=user,
            password=None if password is None else SecretStr(password),
            tls=tls,
        )

    def __str__(self) -> str:
        where = self.path or f"{self.host}:{self.port}"
        return where if not self.db else f"{where}, database {self.db}"

    async def connect(self) -> anyio.abc.ByteStream:
        """A stream to the server, on which nothing was said yet."""
        if self.path is not None:
            return await anyio.connect_unix(self.path)
        if self.tls is None:
            stream: anyio.abc.ByteStream = await anyio.connect_tcp(self.host, self.port)
        else:
            stream = await anyio.connect_tcp(
                self.host, self.port, ssl_context=self.tls, tls_hostname=self.host, tls_standard_compatible=False
            )
        raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return stream


class Connection(BaseConnection):
    """A connection of coredis on a stream that is open already. Theirs open it themselves, and leave buffers behind for the
    garbage collector to complain of when that fails."""

    def __init__(self, address: RedisAddress, stream: anyio.abc.ByteStream) -> None:
        location: Location = TCPLocation(address.host, address.port)
        super().__init__(
            UnixLocation(address.path) if address.path is not None else location,
            username=address.user,
            password=None if address.password is None else address.password.get_secret_value(),
            db=address.db,
            client_name=CLIENT_NAME,
        )
        self._opened = stream

    async def _connect(self) -> anyio.abc.ByteStream:
        return self._opened

    def describe(self) -> str:
        return f"<Redis connection to {self.location!r}>"


async def run_connection(address: RedisAddress, *, task_status: anyio.abc.TaskStatus[Connection]) -> None:
    """Open a connection and keep it until it is lost, or cancelled. Started, with the connection, when it can be used.

    Raises:
        coredis.exceptions.RedisError, OSError: it could not be opened. Its loss later on is no error.
    """
    with anyio.fail_after(CONNECT_TIME):
        stream = _Impatient(await address.connect())
    # No checkpoint until it takes care of what it holds.
    connection = Connection(address, stream)
    failure: RedisError | None = None
    try:
        await connection.run(task_status=_Starting(task_status, connection, stream))
    except RedisError as error:
        failure = error
    if failure is not None:
        # coredis puts its own error in the place of a cancellation while it says hello.
        await checkpoint_if_cancelled()
        raise failure


class _Starting:
    """Passes on what has started."""

    def __init__(
        self, task_status: anyio.abc.TaskStatus[Connection], connection: Connection, stream: _Impatient
    ) -> None:
        self._task_status = task_status
        self._connection = connection
        self._stream = stream

    def started(self, value: None = None) -> None:
        self._stream.be_patient()
        self._task_status.started(self._connection)


class _Impatient(anyio.abc.ByteStream):
    """Breaks if nothing is received before the deadline. coredis takes that for the loss it is; for a cancellation of its
    hello, which is the other way to end it, it writes a traceback to the log."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self._deadline = anyio.current_time() + CONNECT_TIME
        self._receiving: anyio.CancelScope | None = None
        self._stream = stream

    def be_patient(self) -> None:
        """Wait as long as it takes from now on."""
        self._deadline = math.inf
        if self._receiving is not None:
            self._receiving.deadline = math.inf

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if self._deadline == math.inf:
            return await self._stream.receive(max_bytes)
        with anyio.CancelScope(deadline=self._deadline) as self._receiving:
            return await self._stream.receive(max_bytes)
        raise anyio.BrokenResourceError(f"no answer in {CONNECT_TIME:g} s")

    async def send(self, item: bytes) -> None:
        await self._stream.send(item)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _tls(options: dict[str, str], scheme: str) -> ssl.SSLContext | None:
    if scheme != "rediss":
        if options:
            raise SetupError("Options of TLS need TLS", hint="Write rediss:// instead of redis://.")
        return None
    require = options.get("ssl_cert_reqs", "required")
    check_name = options.get("ssl_check_hostname", "true").lower()
    if require not in ("required", "none") or check_name not in ("true", "false"):
        raise SetupError("ssl_cert_reqs must be required or none, ssl_check_hostname true or false")
    try:
        context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
        if certificate := options.get("ssl_certfile"):
            context.load_cert_chain(certificate, options.get("ssl_keyfile"))
    except OSError as error:  # a file that is not there, or holds something else
        raise SetupError(f"The certificates of the Redis URL cannot be used: {error}") from error
    if require == "none" or check_name == "false":
        context.check_hostname = False
    if require == "none":
        context.verify_mode = ssl.CERT_NONE
    return context
