"""Serving an app over Hypercorn's protocols: bind, report the URLs, stop in order."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.utils import repr_socket_addr

from ..exceptions import AddressError, SetupError
from ..settings import ServerSettings
from ..supervision import StopEvent
from .app import WebApp
from .connections import Listener, serve_connections

logger = logging.getLogger(__name__)

_BACKLOG = 1024


async def serve(  # noqa: ASYNC128 - serve_connections calls started()
    app: WebApp,
    settings: ServerSettings,
    *,
    stop: StopEvent | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set or the call is cancelled. Start it with `nursery.start`: the value is the list of URLs.

    On `stop`: `/ready` turns 503 and `app.drain` is set, which ends streams and long polls with complete bodies; after
    `readiness_delay` the listener closes; requests in flight get `graceful_timeout` seconds, then they are cancelled.
    A client that stopped reading is disconnected after `user_timeout`, or then. Cancelling the call ends everything at
    once, except for a write to such a client: keep `supervision.drain_deadline` around the program.

    Raises:
        AddressError: the address cannot be bound.
        SetupError: the TLS files cannot be used, or the event loop is not Trio.
    """
    if not trio.lowlevel.in_trio_task():
        raise SetupError("an HTTP server needs the Trio backend", hint="run it with anyio.run(main, backend='trio')")
    config = _make_config(settings)
    tls = _tls(config)
    bound = await _bind(settings)

    async def wait_stop() -> None:
        if stop is None:
            await trio.sleep_forever()
        else:
            await stop.wait()
        logger.info("stopping: requests in flight get %g s at most", settings.graceful_timeout)
        app.drain.set()
        await trio.sleep(settings.readiness_delay)

    plain = trio.SocketListener(trio.socket.from_stdlib_socket(bound))
    url = f"{'http' if tls is None else 'https'}://{repr_socket_addr(bound.family, bound.getsockname())}"
    listener: Listener = plain if tls is None else trio.SSLListener(plain, tls, https_compatible=True)
    with bound:
        await serve_connections(
            ASGIWrapper(app),  # type: ignore[arg-type]
            config,
            listener,
            url,
            wait_stop=wait_stop,
            task_status=task_status,
        )


def _make_config(settings: ServerSettings) -> Config:
    config = Config()
    config.accesslog = None  # the door writes it, with the request id
    config.errorlog = logging.getLogger("llama_corral.web.hypercorn")
    config.include_server_header = False
    config.certfile = settings.tls_cert
    config.keyfile = settings.tls_key
    config.graceful_timeout = settings.graceful_timeout
    config.keep_alive_timeout = settings.keep_alive_timeout  # a float is fine
    config.keep_alive_max_requests = 1_000_000  # a client is disconnected for a reason, not for its loyalty
    config.read_timeout = None  # it would cut a healthy long poll
    config.h11_max_incomplete_size = settings.header_limit
    config.h2_max_header_list_size = settings.header_limit
    return config


def _tls(config: Config) -> ssl.SSLContext | None:
    try:
        return config.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        raise SetupError(
            f"the TLS certificate or key cannot be used: {error}", hint="check tls_cert and tls_key (PEM files)"
        ) from error


async def _bind(settings: ServerSettings) -> socket.socket:
    """One listening socket. A name with several addresses is bound on its first one, IPv4 before IPv6."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = await trio.socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
        return _listen(family, address, settings.user_timeout)
    except (OSError, UnicodeError, OverflowError) as error:
        raise AddressError(
            f"cannot listen on {where}: {_reason(error)}", hint=_hint(error), host=settings.host, port=settings.port
        ) from error


def _listen(family: int, address: Any, user_timeout: float) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Accepted sockets inherit it. Hypercorn shields its writes without a deadline, so a client that stops
            # reading would keep the server from ever ending.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(user_timeout * 1000))
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _hint(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        return "another process uses this port: stop it, or choose another one (0 for any free one)"
    if code == errno.EACCES:
        return "ports below 1024 need privileges; choose a higher one"
    return "use an address of this machine, 127.0.0.1 or 0.0.0.0"
