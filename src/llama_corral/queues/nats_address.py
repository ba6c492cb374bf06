"""What a NATS URL says."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import SecretStr

from ..exceptions import SetupError
from .urls import credentials_of, hosts_of

_DEFAULT_PORT: Final = 4222


@dataclass(frozen=True)
class NatsAddress:
    """Where the servers are and who we are there. `str` and `repr` say nothing secret."""

    hosts: tuple[str, ...]
    """`host:port` of each server."""
    user: str | None = None
    password: SecretStr | None = None
    token: SecretStr | None = None
    creds: str | None = None
    """The path of a file with a user's JWT and seed."""
    tls: bool = False
    """Whether a server without TLS is refused. One that demands it gets it in any case."""
    context: ssl.SSLContext | None = field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """From `nats://user:password@host:port,host:port`; `tls://` demands TLS. A user without a password is a token.
        Options: `creds` (path of a credentials file), `ca` (path of the certificates to trust).

        Raises:
            SetupError: something in it cannot be used. The text never repeats the URL.
        """
        user, password = credentials_of(url)
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        creds, ca = options.pop("creds", None), options.pop("ca", None)
        if options or parts.path.strip("/"):
            what = f"option {min(options)!r}" if options else "path"
            raise SetupError(
                f"A NATS queue has no {what}",
                hint="Its options are lease, max_messages, patience, replicas, stream, domain, broadcast_buffer, creds, ca.",
            )
        hosts = tuple(_with_port(host) for host in hosts_of(parts))
        if user is None or password is None:
            token = user or password
            user, password = None, None
        else:
            token = None
        return cls(
            hosts=hosts,
            user=user,
            password=None if password is None else SecretStr(password),
            token=None if token is None else SecretStr(token),
            creds=None if creds is None else _checked(creds),
            tls=parts.scheme == "tls",
            context=None if ca is None else _trusting(ca),
        )

    def __str__(self) -> str:
        return ", ".join(self.hosts)

    def options(self) -> dict[str, Any]:
        """For the client's `connect`."""
        found: dict[str, Any] = {
            # Not the credentials: in the URLs, servers that the cluster names would not get them.
            "servers": [f"{'tls' if self.tls else 'nats'}://{host}" for host in self.hosts],
            "user": self.user,
            "password": None if self.password is None else self.password.get_secret_value(),
            "token": None if self.token is None else self.token.get_secret_value(),
        }
        if self.creds is not None:
            found["user_credentials"] = self.creds
        if self.context is not None:
            found["tls"] = self.context
        return found


def _with_port(host: str) -> str:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise SetupError("The NATS URL names no server", hint="Write nats://host:4222.")
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{name}:{parts.port or _DEFAULT_PORT}"


def _checked(creds: str) -> str:
    """The path, if the file has what the client looks for: in another one it would look for ever."""
    try:
        text = Path(creds).read_text(errors="replace")
    except OSError as error:
        raise SetupError(f"The credentials file cannot be read: {error}") from error
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise SetupError(f"{creds} is no credentials file of NATS", hint="It has a user's JWT and a seed.")
    if find_spec("nkeys") is None:
        raise SetupError(
            "A credentials file of NATS needs the package nkeys", hint="Install it: pip install 'nats-py[nkeys]'."
        )
    return creds


def _trusting(ca: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # it is not there, or holds something else
        raise SetupError(f"The certificates at {ca} cannot be used: {error}") from error
