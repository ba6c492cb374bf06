"""Settings of the servers, from arguments and from the environment (prefix `CORRAL_`).

Read when a class is called, never at import. Secrets are `SecretStr`; a `repr`, a log line or a validation error never
shows them.
"""

from __future__ import annotations

import logging
import re
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

logger = logging.getLogger(__name__)

_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


class _EnvWithoutServiceLinks(EnvSettingsSource):
    """The environment without what Kubernetes puts there for a Service named like our prefix: a Service `corral` gives
    every pod of its namespace `CORRAL_PORT=tcp://10.0.0.1:8000`, which is nobody's port number."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        if isinstance(value, str) and _SERVICE_LINK.fullmatch(value):
            logger.warning(
                "ignored %s: it holds a Kubernetes service link; enableServiceLinks: false in the pod silences this",
                f"{self.env_prefix}{field_name}".upper(),
            )
            return None, key, is_complex
        return value, key, is_complex


class CorralSettings(BaseSettings):
    """Base of all settings classes: prefix `CORRAL_`, arguments before environment, service links ignored."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="CORRAL_", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - replaced
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _EnvWithoutServiceLinks(settings_cls), dotenv_settings, file_secret_settings


class ServerSettings(CorralSettings):
    """How an HTTP server listens and what it accepts. Every server of the project takes one."""

    host: str = Field(
        "127.0.0.1", description="Address to bind. Loopback unless told otherwise; 0.0.0.0 means everybody."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to bind; 0 lets the system choose a free one.")
    token: SecretStr | None = Field(
        None, description="Bearer token that every request but /health and /ready must carry."
    )
    tls_cert: str | None = Field(None, description="PEM file with the certificate chain.")
    tls_key: str | None = Field(None, description="PEM file with the private key of tls_cert.")

    header_limit: int = Field(32_768, ge=1024, description="Largest request head (request line and headers), in bytes.")
    body_limit: int = Field(10_000_000, ge=0, description="Largest request body, in bytes.")
    body_timeout: float = Field(30.0, gt=0, description="Seconds in which a request body must have arrived.")
    keep_alive_timeout: float = Field(
        30.0, gt=0, description="Seconds that an idle connection, or one still sending its headers, is kept."
    )
    user_timeout: float = Field(
        30.0, gt=0, description="Seconds after which a client that stopped reading is disconnected (Linux)."
    )

    graceful_timeout: float = Field(10.0, ge=0, description="Seconds that requests in flight get after a stop.")
    readiness_delay: float = Field(
        0.0,
        ge=0,
        description="Seconds between `/ready` turning 503 and the listener closing, for load balancers to notice.",
    )

    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call this server, comma separated; '*' for all. Closed by default."
    )
    access_log: bool = Field(False, description="Log one line a request.")
    log_format: Literal["text", "json"] = "text"
    debug: bool = Field(False, description="Show tracebacks of failed tasks in their records.")

    @field_validator("token")
    @classmethod
    def _no_empty_token(cls, token: SecretStr | None) -> SecretStr | None:
        # A secret that was not filled in must not open the server.
        if token is not None and not token.get_secret_value().strip():
            raise ValueError("the token is empty; unset it to run without one")
        return token

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(origin.strip().rstrip("/") for origin in value.split(",") if origin.strip())
        return value

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both or none")
        return self


class QueueSettings(CorralSettings):
    """What opens the broker, where it is not in its URL. Nobody is told: every process has its own."""

    queue_user: str | None = Field(None, description="User of the message queue.")
    queue_password: SecretStr | None = Field(None, description="Password of the message queue.")


class StoreSettings(CorralSettings):
    """What opens the database, where it is not in its URL."""

    store_password: SecretStr | None = Field(None, description="Password of the user in the URL of the store.")


class ClientSettings(CorralSettings):
    """What a program that is a client without being given options needs."""

    token: SecretStr | None = Field(None, description="Bearer token of the control plane.")


SHORTEST_SECRET: Final = 16


class StateSettings(CorralSettings):
    """What seals the stored state of workflows, so that nobody who writes to the store can change it unseen."""

    state_secret: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Secrets, comma separated: the first one seals, all of them verify. To change it, put the new one in "
        "front and take the old one out when no state is left that it sealed.",
    )

    @field_validator("state_secret", mode="before")
    @classmethod
    def _split_secrets(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        secrets = [part.strip() for part in value.split(",")]
        if any(len(secret) < SHORTEST_SECRET for secret in secrets):
            # A secret that was not filled in must not leave the state open.
            raise ValueError(f"a secret has less than {SHORTEST_SECRET} characters; unset it to run without one")
        return tuple(map(SecretStr, secrets))
