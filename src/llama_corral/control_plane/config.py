"""How a control plane behaves: the original's `ControlPlaneConfig` with our own settings beside its fields."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from ..protocol.topics import DEFAULT_NAMESPACE
from ..settings import CorralSettings


class ControlPlaneConfig(CorralSettings):
    """Settings of a control plane, from arguments and from the environment (prefix `CONTROL_PLANE_`).

    The fields up to `use_tls` have the original's names and defaults, because its services read them from the answer to
    their registration; `step_interval`, the store keys and `state_store_uri` are reported and decide nothing here.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="CONTROL_PLANE_", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    services_store_key: str = "services"
    tasks_store_key: str = "tasks"
    session_store_key: str = "sessions"
    step_interval: float = Field(0.1, description="Reported as the original does. Nothing polls.")
    host: str = "127.0.0.1"
    port: int = 8000
    internal_host: str | None = None
    internal_port: int | None = None
    running: bool = True
    cors_origins: list[str] | None = None
    topic_namespace: str = Field(
        DEFAULT_NAMESPACE, min_length=1, description="What the names of all topics begin with."
    )
    state_store_uri: str | None = Field(None, description="Accepted for the original's sake; give a store instead.")
    use_tls: bool = False

    heartbeat_interval: float = Field(5.0, gt=0, description="Seconds between two heartbeats of an instance.")
    lease: float = Field(20.0, gt=0, description="Seconds without a heartbeat after which an instance counts as dead.")
    backstop_interval: float = Field(
        30.0, gt=0, description="Seconds between two looks at what should have happened by itself."
    )
    publish_timeout: float = Field(5.0, gt=0, description="Seconds that the message queue gets for one message.")
    max_attempts: int = Field(
        3, ge=1, description="How often a task that does not say so itself may lose its worker before it is failed."
    )
    max_queued_tasks: int = Field(
        100_000, ge=0, description="Tasks that may wait for one service; more are refused. 0: any number."
    )
    retention: float = Field(
        7 * 86_400.0,
        ge=0,
        description="Seconds for which ended tasks are kept with all that belongs to them. 0: for ever.",
    )

    @property
    def url(self) -> str:
        return f"{'https' if self.use_tls else 'http'}://{self.host}:{self.port}"

    def public(self) -> dict[str, Any]:
        """The original's fields, as answered to whoever asks: `state_store_uri`, which may hold a password, is left
        empty."""
        return {name: getattr(self, name) for name in ORIGINAL_FIELDS} | {"state_store_uri": None}


ORIGINAL_FIELDS: Final = tuple(ControlPlaneConfig.model_fields)[
    : list(ControlPlaneConfig.model_fields).index("use_tls") + 1
]
