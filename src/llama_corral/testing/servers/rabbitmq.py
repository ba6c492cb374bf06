"""A RabbitMQ node of a test's own."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import anyio

from ...supervision import SupportGroup
from .base import ServerProcess, free_port


class RabbitMQServer(ServerProcess):
    """Keeps what is durable over a restart. Its name, ports, folders, plugins (none) and cookie are its own; with other
    nodes of the machine it shares only Erlang's port mapper, which stays when it ends.

    Killed within half a second after a quorum queue was declared, it has lost that queue, and does not find a leader for it.

    Args:
        settings: Lines of its `rabbitmq.conf`, beside the addresses.
        certificate: Files with a certificate for 127.0.0.1 and its key: it speaks TLS too, on a port of its own.
    """

    program = "rabbitmq-server"
    places: ClassVar[Sequence[str]] = ("/usr/lib/rabbitmq/bin", "/usr/sbin", "/usr/local/sbin")
    ready = re.compile(r"Server startup complete")

    def __init__(
        self,
        group: SupportGroup,
        folder: Path,
        *,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
        settings: Sequence[str] = (),
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        super().__init__(group, folder, name=name, environment=environment)
        # What a distribution puts on the PATH looks who calls it, and becomes somebody else.
        self.binary = shutil.which(self.program, path=self.places[0]) or self.binary
        self.node = f"corral-{self.port}@localhost"
        self._tls_port = free_port()
        self._certificate = certificate
        self._settings = tuple(settings)
        self._environment |= self._places_of_its_own()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        return f"amqps://guest:guest@127.0.0.1:{self._tls_port}"

    async def control(self, *arguments: str) -> str:
        """What `rabbitmqctl` with these arguments prints. It takes a second or more."""
        program = Path(self.binary).with_name("rabbitmqctl")
        done = await anyio.run_process([program, "-q", "-n", self.node, *arguments], env=self._environment)
        return done.stdout.decode()

    def arguments(self) -> list[str]:
        # The script becomes the server, and signals reach it, if it is told that there is somebody to type: there is not.
        return ["-noinput"]

    def command(self) -> list[str]:
        lines = ["log.console = true", "log.console.level = info", *self._settings]
        if self._certificate is not None:
            certificate, key = self._certificate
            lines += [f"listeners.ssl.1 = 127.0.0.1:{self._tls_port}", "ssl_options.verify = verify_none"]
            lines += [f"ssl_options.certfile = {certificate}", f"ssl_options.keyfile = {key}"]
        (self.folder / "rabbitmq.conf").write_text("".join(f"{line}\n" for line in lines))
        (self.folder / "enabled_plugins").write_text("[].\n")
        return super().command()

    def _places_of_its_own(self) -> dict[str, str]:
        names = {
            "MNESIA_BASE": "mnesia",
            "LOG_BASE": "log",
            "PID_FILE": "pid",
            "ENABLED_PLUGINS_FILE": "enabled_plugins",
            "CONFIG_FILE": "rabbitmq.conf",
            "ADVANCED_CONFIG_FILE": "advanced.config",
            "CONF_ENV_FILE": "rabbitmq-env.conf",
        }
        # What the rest is set to for another node is not for this one.
        others = {name: "" for name in os.environ if name.startswith("RABBITMQ_")}
        return {
            **others,
            **{f"RABBITMQ_{name}": str(self.folder / place) for name, place in names.items()},
            "HOME": str(self.folder),  # of the cookie
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ALLOW_INPUT": "1",
            # One scheduler, which does not spin: tests have other things to do.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
