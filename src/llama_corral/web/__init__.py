"""HTTP servers: one way to build them, one way to serve them.

`app.py` the application and its own routes; `routes.py` how a handler's signature becomes validation; `door.py` what
every request passes: id, token, limits, the watch for the client going away; `errors.py` the only place that knows
statuses; `streams.py` NDJSON, SSE and long polls; `openapi.py` the document; `server.py` Hypercorn, bound and stopped.
"""

from .app import WebApp as WebApp
from .errors import ErrorBody as ErrorBody
from .logs import configure_logging as configure_logging
from .messages import Request as Request
from .messages import Response as Response
from .messages import last_event_id as last_event_id
from .routes import Routes as Routes
from .server import serve as serve
from .streams import ServerEvent as ServerEvent
from .streams import Stream as Stream
from .streams import Wakeup as Wakeup
from .streams import ndjson as ndjson
from .streams import sse as sse
from .streams import wait_changed as wait_changed
