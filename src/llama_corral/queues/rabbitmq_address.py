"""Where RabbitMQ is and who we are there: what a URL says."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from pydantic import SecretStr

from ..exceptions import SetupError
from .urls import credentials_of, hosts_of

HEARTBEAT: Final = 10
"""Seconds between two signs of life, unless the URL says otherwise. A server that is silent for three is given up."""

_CLIENT_OPTIONS: Final = frozenset({"heartbeat", "name", "auth"})
_TLS_OPTIONS: Final = frozenset({"cafile", "capath", "certfile", "keyfile", "no_verify_ssl"})


@dataclass(frozen=True)
class RabbitMQAddress:
    """Where the servers are and who we are there. `str` and `repr` say nothing secret."""

    hosts: tuple[str, ...]
    """`host` or `host:port` of each node of a cluster."""
    vhost: str = "/"
    user: str | None = field(default=None, repr=False)
    """None: the server's own `guest`."""
    password: SecretStr | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    """Of the client."""

    @classmethod
    def from_url(cls, url: str) -> Self:
        """From `amqp://user:password@host:port,host:port/vhost`; `amqps://` speaks TLS. Options: `heartbeat` (seconds),
        `name` (of the connections, for the server's lists), `auth` (`external`: by certificate); with TLS `cafile`,
        `capath`, `certfile`, `keyfile` (paths), `no_verify_ssl`.

        Raises:
            SetupError: something in it cannot be used. The text never repeats the URL.
        """
        user, password = credentials_of(url)
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        hosts = tuple(hosts_of(parts))
        if not all(urlsplit(f"//{host}").hostname for host in hosts):
            raise SetupError("The RabbitMQ URL names no server", hint="Write amqp://host:5672/vhost.")
        for name in options:
            if name not in _CLIENT_OPTIONS | _TLS_OPTIONS:
                known = sorted(
                    {"prefetch", "max_messages", "patience", "broadcast_buffer"} | _CLIENT_OPTIONS | _TLS_OPTIONS
                )
                raise SetupError(
                    f"A RabbitMQ queue has no option {name!r}", hint=f"Its options are {', '.join(known)}."
                )
        if not options.get("heartbeat", "1").isdigit():
            raise SetupError(
                "The option 'heartbeat' of the queue URL cannot be read", hint="It is a number of seconds."
            )
        return cls(
            hosts=hosts,
            vhost=unquote(parts.path[1:]) or "/",
            user=user,
            password=None if password is None else SecretStr(password),
            tls=_tls(options) if parts.scheme.lower() == "amqps" else None,
            options={name: value for name, value in options.items() if name in _CLIENT_OPTIONS},
        )

    def __str__(self) -> str:
        where = ", ".join(self.hosts)
        return where if self.vhost == "/" else f"{where} (virtual host {self.vhost})"

    def client_url(self, host: str) -> str:
        """With everything that is secret: not to be shown."""
        user = "" if self.user is None else quote(self.user, safe="")
        word = "" if self.password is None else f":{quote(self.password.get_secret_value(), safe='')}"
        at = "@" if user or word else ""
        options = {"heartbeat": str(HEARTBEAT), "name": "llama-corral", **self.options}
        scheme = "amqp" if self.tls is None else "amqps"
        return f"{scheme}://{user}{word}{at}{host}/{quote(self.vhost, safe='')}?{urlencode(options)}"


def _tls(options: Mapping[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"), capath=options.get("capath"))
        if "certfile" in options:
            context.load_cert_chain(options["certfile"], options.get("keyfile"))
    except OSError as error:  # a file is not there, or holds something else
        raise SetupError(f"A certificate that the RabbitMQ URL names cannot be used: {error}") from error
    if options.get("no_verify_ssl", "0") != "0":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
