"""Real servers for tests that kill and restart them, each with a port and a folder of its own."""

from __future__ import annotations

from .base import ServerMissingError as ServerMissingError
from .base import ServerProcess as ServerProcess
from .nats import NatsServer as NatsServer
from .postgres import PostgresServer as PostgresServer
from .rabbitmq import RabbitMQServer as RabbitMQServer
from .redis import RedisServer as RedisServer
