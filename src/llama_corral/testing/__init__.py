"""For tests of adapters and of applications: contract suites and fault injectors. Nothing here needs pytest.

* `queues.py`: `MessageQueueContract`, what every message queue must do.
* `faults.py`: `FaultyMessageQueue`, a queue whose links a test breaks by name.
"""

from __future__ import annotations

from .faults import Fault as Fault
from .faults import FaultyMessageQueue as FaultyMessageQueue
from .faults import Hang as Hang
from .queues import MessageQueueContract as MessageQueueContract
