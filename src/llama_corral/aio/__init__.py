"""Hosting asyncio code on Trio: the only package, with the adapters of asyncio clients, that imports asyncio.

On the asyncio backend everything here is the plain thing; on Trio an asyncio loop (trio-asyncio) runs inside Trio, and
asyncio coroutines are awaited across the border.
"""

from .bell import Bell as Bell
from .flavour import caller_library as caller_library
from .flavour import current_task_identity as current_task_identity
from .flavour import in_foreign_library as in_foreign_library
from .flavour import is_blocked_on as is_blocked_on
from .flavour import library_clock as library_clock
from .host import SelfCancelled as SelfCancelled
from .host import await_in as await_in
from .host import call_asyncio as call_asyncio
from .host import call_native as call_native
from .host import free_tasks_of as free_tasks_of
from .host import has_asyncio_loop as has_asyncio_loop
from .host import hosted_tasks as hosted_tasks
from .host import kept_tasks as kept_tasks
from .host import open_asyncio_loop as open_asyncio_loop
from .lock import FlavourLock as FlavourLock
from .lock import FlavourSemaphore as FlavourSemaphore
