"""WORKS: takes tickets from a queue and runs a workflow for each, bounded by a cap."""

from .base import BaseService as BaseService
from .checkpoints import CheckpointPolicy as CheckpointPolicy
from .codec import WorkflowCodec as WorkflowCodec
from .config import WorkflowServiceConfig as WorkflowServiceConfig
from .queue_coordinator import QueueCoordinator as QueueCoordinator
from .resuming import OnChange as OnChange
from .workflow import ServiceStatistics as ServiceStatistics
from .workflow import WorkflowService as WorkflowService
