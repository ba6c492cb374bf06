"""Workflows that run as another service.

* `workflow.py`: `RemoteWorkflow`, and the handler of a run of it.
* `call.py`: one call: what its step does, and what is known of it meanwhile.
* `events.py`: what comes off the wire, as events, results and errors.
"""

from .events import RemoteCancelled as RemoteCancelled
from .events import RemoteEvent as RemoteEvent
from .events import RemoteTimedOut as RemoteTimedOut
from .workflow import RemoteHandler as RemoteHandler
from .workflow import RemoteWorkflow as RemoteWorkflow
