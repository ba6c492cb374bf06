"""Configuration of a workflow service: the original's fields, defaults and environment prefix."""

from __future__ import annotations

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class WorkflowServiceConfig(BaseSettings):
    """How a workflow is served. Environment: `LLAMA_DEPLOY_WF_SERVICE_` and the field's name in upper case.

    `host` and `port` are what the service tells others; `internal_host` and `internal_port`, where they are set, are what
    it binds. `step_interval` is accepted and reported, and nothing polls by it. `max_concurrent_tasks` is the number of
    runs that may work at a time; runs that wait for a message or a person do not count.
    """

    model_config = SettingsConfigDict(env_prefix="LLAMA_DEPLOY_WF_SERVICE_", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    internal_host: str | None = None
    internal_port: int | None = Field(default=None, ge=0, le=65535)
    service_name: str = "default_workflow_service"
    description: str = "A service that wraps a llama-index workflow."
    step_interval: float = 0.1
    max_concurrent_tasks: int = Field(default=8, ge=1)
    raise_exceptions: bool = False
    use_tls: bool = False

    @field_validator("service_name")
    @classmethod
    def _named(cls, name: str) -> str:
        if not name or "/" in name or name != name.strip():
            raise ValueError("a service name is not empty, has no slash and no blank around it")
        return name

    @property
    def url(self) -> str:
        """Where others reach the service's own HTTP server, if it runs one."""
        return f"{'https' if self.use_tls else 'http'}://{self.host}:{self.port}"
