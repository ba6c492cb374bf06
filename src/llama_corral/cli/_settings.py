"""From options of a command line to settings, with one line for what is wrong."""

from __future__ import annotations

import logging
from typing import Any, Literal, TypeVar

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings

from ..exceptions import SetupError

S = TypeVar("S", bound=BaseSettings)


def make_settings(kind: type[S], **given: Any) -> S:
    """Settings from what was given (None: was not) and the environment.

    Raises:
        SetupError: a value is wrong. The text names the setting and never repeats the value.
    """
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as exc:
        found = exc.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, found["loc"][:1]))
        raise SetupError(f"the settings are wrong: {f'{where}: ' if where else ''}{found['msg']}") from exc


def make_server_settings(*, token: str | None, **given: Any) -> Any:
    """`ServerSettings` of a program. Raises SetupError."""
    from ..settings import ServerSettings

    return make_settings(ServerSettings, token=SecretStr(token) if token is not None else None, **given)


def make_control_plane_config(
    *, retention: float | None, max_queued_tasks: int | None, heartbeat: float | None, lease: float | None
) -> Any:
    """`ControlPlaneConfig` of a program. Raises SetupError."""
    from ..control_plane import ControlPlaneConfig

    return make_settings(
        ControlPlaneConfig,
        retention=retention,
        max_queued_tasks=max_queued_tasks,
        heartbeat_interval=heartbeat,
        lease=lease,
    )


def read_state_secret() -> tuple[SecretStr, ...]:
    """What seals stored state, from the environment. Raises SetupError."""
    from ..settings import StateSettings

    secrets: tuple[SecretStr, ...] = make_settings(StateSettings).state_secret
    return secrets


def read_queue_credentials() -> Any:
    """`QueueSettings` from the environment. Raises SetupError."""
    from ..settings import QueueSettings

    return make_settings(QueueSettings)


def read_store_password() -> SecretStr | None:
    """The password of the store from the environment. Raises SetupError."""
    from ..settings import StoreSettings

    password: SecretStr | None = make_settings(StoreSettings).store_password
    return password


def set_up_logging(log_format: Literal["text", "json"], log_level: str) -> None:
    """Log lines on stderr."""
    from ..web import configure_logging

    configure_logging(log_format, level=getattr(logging, log_level.upper()))
