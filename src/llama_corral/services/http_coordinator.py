"""The coordinator of a service whose control plane is another process, reached over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Self, TypeVar

from pydantic import SecretStr, TypeAdapter
from pydantic_core import to_json

from ..abc import Coordinator, LocalService
from ..exceptions import BadInput, Incompatible
from ..http_link import HttpLink
from ..protocol import calls
from ..protocol.records import (
    Checkpoint,
    Claim,
    HeartbeatAnswer,
    HeldTask,
    InboxPage,
    Registration,
    Report,
    ReportAnswer,
    ServiceInfo,
    Ticket,
)

T = TypeVar("T")

PATIENCE: Final = 10.0
"""Seconds that a heartbeat or a claim may take, or half of the lease if that is less: one that hangs must leave time for
another before the lease ends."""

_REGISTRATION: Final = TypeAdapter(Registration)
_CLAIM: Final[TypeAdapter[Claim | None]] = TypeAdapter(Claim | None)
_REPORTED: Final = TypeAdapter(ReportAnswer)
_BEATEN: Final = TypeAdapter(HeartbeatAnswer)
_PAGE: Final = TypeAdapter(InboxPage)
_NOTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)


class HttpCoordinator(Coordinator):
    """Asks a control plane over HTTP: `async with HttpCoordinator(url, token=token) as coordinator: ...`.

    Calls are not repeated here. Each of them may be: its answer is the same again.

    Args:
        control_plane_url: Where the control plane is, or several of them as `HttpLink` takes them.
        token: Its bearer token.
        link: An open connection pool to it, to be used instead of one of its own; its owner closes it.

    Raises (all calls):
        Unavailable: the control plane is away, or cannot answer now.
        UsageError: it refused: Unauthorized, TooLarge, Incompatible (in `register`), ... Repeating it will not help.
    """

    def __init__(
        self,
        control_plane_url: str | Sequence[str],
        *,
        token: str | SecretStr | None = None,
        link: HttpLink | None = None,
    ) -> None:
        self._owns_link = link is None
        self.link = HttpLink(control_plane_url, token) if link is None else link
        self._patience = PATIENCE

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._owns_link:
            await self.link.__aexit__(*exc_info)  # noqa: ASYNC102 - shielded and bounded there

    async def register(self, info: ServiceInfo, local: LocalService | None = None) -> Registration:
        registration = await self._ask(calls.REGISTER, info, _REGISTRATION)
        if registration.protocol_version not in info.protocol_versions:
            raise Incompatible(
                f"{self.link.url} speaks version {registration.protocol_version} of the protocol, this release "
                f"{', '.join(map(str, info.protocol_versions))}",
                hint="Upgrade the older one of worker and control plane.",
            )
        if registration.lease > 0:
            self._patience = min(PATIENCE, registration.lease / 2)
        return registration

    async def deregister(self, instance_id: str) -> None:
        await self._ask(calls.DEREGISTER, calls.DeregisterCall(instance_id), _NOTHING)

    async def claim(self, ticket: Ticket, instance_id: str, nonce: str) -> Claim | None:
        call = calls.ClaimCall(ticket, instance_id, nonce)
        return await self._ask(calls.CLAIM, call, _CLAIM, timeout=self._patience)

    async def report(self, report: Report) -> ReportAnswer:
        return await self._ask(calls.REPORT, report, _REPORTED)

    async def release(
        self,
        task_id: str,
        epoch: int,
        checkpoint: Checkpoint | None,
        *,
        idle: bool = False,
        wake_at: float | None = None,
    ) -> ReportAnswer:
        call = calls.ReleaseCall(task_id, epoch, checkpoint, idle, wake_at)
        return await self._ask(calls.RELEASE, call, _REPORTED)

    async def heartbeat(self, instance_id: str, held: Sequence[HeldTask]) -> HeartbeatAnswer:
        call = calls.HeartbeatCall(instance_id, tuple(held))
        return await self._ask(calls.HEARTBEAT, call, _BEATEN, timeout=self._patience)

    async def pull(self, task_id: str, epoch: int, after: int) -> InboxPage:
        return await self._ask(calls.PULL, calls.PullCall(task_id, epoch, after), _PAGE)

    async def _ask(self, path: str, call: Any, answer: TypeAdapter[T], *, timeout: float | None = None) -> T:
        try:
            body = to_json(call, inf_nan_mode="null")
        except ValueError as error:  # a text with a lone surrogate
            raise BadInput(f"cannot be sent as JSON: {error}") from error
        return await self.link.ask("POST", path, answer.validate_json, body=body, timeout=timeout)
