"""DECIDES: sessions, tasks, claims, the reaper, the registry. `http/` holds its routes.

* `plane.py`: `ControlPlane`, the coordinator and what routes and messages call.
* `coordinator.py`: the seam to the services.
* `effects.py`: what follows from a stored change: tickets, wake-ups, news for readers.
* `upkeep.py`, `leases.py`: backstop, deadlines, reaper.
* `reports.py`, `inbound.py`: services that report by messages, as the original's do.
* `sessions.py`, `registry.py`: sessions and services; which of them are in this process.
* `checks.py`, `config.py`: input; settings.
"""

from __future__ import annotations

from .config import ControlPlaneConfig as ControlPlaneConfig
from .plane import ControlPlane as ControlPlane
