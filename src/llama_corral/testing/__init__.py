"""For tests of adapters and of applications: contract suites and fault injectors. Nothing here needs pytest.

* `queues.py`: `MessageQueueContract`, what every message queue must do.
* `brokers.py`: `BrokerContract`, what the queue of a server must do beside that.
* `servers/`: real servers with a port and data of their own, which a test kills and starts again.
* `faults.py`: `FaultyMessageQueue`, a queue whose links a test breaks by name.
* `store_faults.py`: `FaultyStore`, a store that fails at the n-th write, loses answers, hangs, or has no room.
* `coordinator_faults.py`: `FaultyCoordinator`, the same between a service and whoever decides.
* `call_faults.py`: what the two have in common.
* `processes.py`: `open_stack`, real processes that a test kills, stops and starts again.
"""

from __future__ import annotations

from .brokers import BrokerContract as BrokerContract
from .call_faults import CallFault as CallFault
from .call_faults import HungCall as HungCall
from .coordinator_faults import FaultyCoordinator as FaultyCoordinator
from .faults import Fault as Fault
from .faults import FaultyMessageQueue as FaultyMessageQueue
from .faults import Hang as Hang
from .processes import Program as Program
from .processes import Stack as Stack
from .processes import open_stack as open_stack
from .queues import MessageQueueContract as MessageQueueContract
from .store_faults import FaultyStore as FaultyStore
