"""CARRIES: the message queues, one file for each technology, all tested against `llama_corral.testing.queues`.

* `memory.py`: inside one process; the reference behaviour.
* `http.py`: the queue of a control plane in another process; its server keeps `leases.py`.
* `redis.py`: streams of a Redis server; `redis_scripts.py` says how a topic is kept there.
* `consumers.py`: the original's thin layer for users; our own path does not use it.

Adapters that need an extra are imported by `open_queue` when their scheme is asked for, never here.
"""

from __future__ import annotations

from ._open import SCHEMES as SCHEMES
from ._open import open_queue as open_queue
from .memory import MemoryMessageQueue as MemoryMessageQueue
