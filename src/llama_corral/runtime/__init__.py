"""The AnyIO-native runtime for llama-index workflows. The only package that touches `workflows` internals."""

from .api import make_run as make_run
from .api import open_run as open_run
from .api import run_workflow as run_workflow
from .checks import check_served as check_served
from .child_runtime import start_child_run as start_child_run
from .describe import workflow_fingerprint as workflow_fingerprint
from .describe import workflow_state_type as workflow_state_type
from .describe import workflow_step_functions as workflow_step_functions
from .fitting import misfits as misfits
from .handler import RunHandler as RunHandler
from .hooks import RunHooks as RunHooks
from .hooks import Slot as Slot
from .hooks import SlotHooks as SlotHooks
from .nesting import current_activity as current_activity
from .options import RunOptions as RunOptions
from .options import RunStatistics as RunStatistics
from .options import StepFlavour as StepFlavour
from .options import sync_step_limiter as sync_step_limiter
from .registry import speaks as speaks
from .run import Run as Run
from .serializer import ContextSerializer as ContextSerializer
from .serializer import KeptElsewhere as KeptElsewhere
from .state import new_context as new_context
from .stream import EventReader as EventReader
from .structured import StructuredRuntime as StructuredRuntime
