"""How topics are kept in JetStream: the names, and the requests to its API (https://docs.nats.io, "JetStream wire API").

One stream with work-queue retention holds all topics: a message is deleted when it is acked, and what nobody consumes yet
waits. Such a stream takes one consumer for each subject, so each group of a topic has a subject of its own:

* `corral.q.TOPIC`: the first group of the topic, whatever its name. The server refuses a second consumer there, which
  decides who is first. Publishers need not know of it, and what was published before it came, waits there.
* `corral.q.TOPIC.GROUP`: every other group. It puts a mark at `corral.g.TOPIC.GROUP`, in the same stream. Publishers ask
  once which marks a topic has, and hear of new ones because they are subscribed there.

A publisher looks at the marks again when its message is acknowledged: a mark that was set before that moment has come by
then, on the same connection.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from nats.aio.msg import Msg

from ..exceptions import QueueUnavailable, SetupError, TooLarge
from .nats_connection import Away, NatsConnection, NoResponders, Pending

logger = logging.getLogger(__name__)

MAX_TOKEN: Final = 120
"""Characters; names of consumers hold two of them, and are names of folders at the server."""
REMEMBERED_TOPICS: Final = 10_000
DUPLICATES: Final = 60.0
"""Seconds for which the stream remembers what was published, so that publishing it again adds nothing."""
MAX_WAITING: Final = 10_000
"""Requests for a message that wait at one group, which is: consumers that have nothing to do."""

_NO_JETSTREAM: Final = (10039, 10076)
_MESSAGE_TOO_LARGE: Final = 10054
_STREAM_NOT_FOUND: Final = 10059
_OTHER_CONFIGURATION: Final = 10058
_CONSUMER_NOT_FOUND: Final = 10014
_SUBJECT_TAKEN: Final = (10099, 10100)
_NO_CLUSTER: Final = 10074
_WRONG_SEQUENCE: Final = 10071
_NOT_STORED: Final = 10077
"""The stream is full, in messages or in bytes."""


class ApiError(Exception):
    """JetStream answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.status = int(error.get("code", 500))
        self.code = int(error.get("err_code", 0))
        self.description = str(error.get("description", ""))
        super().__init__(f"{self.description} ({self.code})")


def token_of(text: str) -> str:
    """One token of a subject for any text: as in URLs, the point too. What is too long is told apart by its hash."""
    # With = for %, which the server would take for its own when it is in the name of a consumer.
    token = quote(text, safe="", errors="surrogatepass").replace(".", "%2E").replace("%", "=")
    if 0 < len(token) <= MAX_TOKEN:
        return token
    return "==" + hashlib.sha256(token.encode()).hexdigest()  # no quoted text begins like this


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)


def read_answer(answer: Msg) -> dict[str, Any]:
    """What JetStream says. Raises ApiError."""
    found: dict[str, Any] = json.loads(answer.data)
    if "error" in found:
        raise ApiError(found["error"])
    return found


@dataclass(slots=True)
class Marks:
    """The groups of a topic beside the first, as tokens. `known`: the server was asked."""

    groups: set[str]
    known: bool = False


@dataclass(frozen=True)
class ConsumerName:
    """A group of a topic at the server. `lease` is the one that it has there; `is_first` says which subject is its own."""

    name: str
    lease: float
    is_first: bool


class Stream:
    """The stream of a queue.

    Args:
        name: Of the stream; its subjects begin with it.
        domain: Of JetStream, where the server leads to several.
        max_messages: Limit of the stream when it is created. It is never changed here, nor is anything else of it.
        replicas: Servers of a cluster that keep it, when it is created.

    Attributes:
        is_durable: Whether the server keeps it in files. Known after `prepare`.
    """

    def __init__(self, name: str, *, domain: str | None, max_messages: int, replicas: int) -> None:
        self.name = name
        self.is_durable = True
        self._api = "$JS.API" if domain is None else f"$JS.{domain}.API"
        self._max_messages = max_messages
        self._replicas = replicas
        self._marks: OrderedDict[str, Marks] = OrderedDict()
        self._told = False

    # Names

    def subject(self, topic: str, group: str | None = None) -> str:
        """Of the first group, or of another one, given as a token."""
        return f"{self.name}.q.{topic}" if group is None else f"{self.name}.q.{topic}.{group}"

    def broadcast_subject(self, topic: str) -> str:
        return f"{self.name}.b.{token_of(topic)}"

    # The stream

    async def prepare(self, connection: NatsConnection) -> None:
        """Find or create the stream, and follow the marks of groups from now on.

        Raises:
            SetupError: JetStream is not enabled, or there is another stream with that name or these subjects.
            Away: no answer.
        """
        try:
            await self.restore(connection)
        except NoResponders:
            raise self._no_jetstream(connection) from None
        self._marks.clear()
        await connection.subscribe(f"{self.name}.g.*.*", self._hear_mark, flush=True)

    async def restore(self, connection: NatsConnection) -> None:
        """Find or create the stream. Raises Away and SetupError."""
        try:
            try:
                info = await self.ask(connection, f"STREAM.INFO.{self.name}")
            except ApiError as error:
                if error.code != _STREAM_NOT_FOUND:
                    raise
                info = await self._create(connection)
        except ApiError as error:
            raise self.explain(error, connection) from error
        self._check(info["config"])

    async def _create(self, connection: NatsConnection) -> dict[str, Any]:
        wanted = {
            "name": self.name,
            "subjects": self._subjects,
            "retention": "workqueue",
            "storage": "file",
            "discard": "new",
            "max_msgs": self._max_messages,
            "num_replicas": self._replicas,
            "duplicate_window": nanoseconds(DUPLICATES),
        }
        try:
            created = await self.ask(connection, f"STREAM.CREATE.{self.name}", wanted)
        except ApiError as error:
            if error.code != _OTHER_CONFIGURATION:
                raise
            return await self.ask(connection, f"STREAM.INFO.{self.name}")  # somebody was faster
        logger.info("created the stream %s at %s", self.name, connection.address)
        return created

    @property
    def _subjects(self) -> list[str]:
        return [f"{self.name}.q.>", f"{self.name}.g.>"]

    def _check(self, config: dict[str, Any]) -> None:
        missing = [subject for subject in self._subjects if subject not in config.get("subjects", ())]
        if missing or config.get("retention") != "workqueue":
            what = f"does not take the subjects {', '.join(missing)}" if missing else "is no work queue"
            raise SetupError(
                f"The stream {self.name} is there already, and {what}",
                hint="Name another one with ?stream=NAME, or delete it and let it be created.",
            )
        self.is_durable = config.get("storage") == "file"
        if not self._told:
            self._told = True
            if config.get("discard") != "new":
                logger.warning("the stream %s drops old messages when it is full (discard policy old)", self.name)
            if (limit := config.get("max_msgs")) != self._max_messages:
                logger.info("the stream %s was created with another limit of messages: %s", self.name, limit)

    # Groups

    async def ensure_consumer(
        self, connection: NatsConnection, topic: str, group: str, lease: float, *, may_be_first: bool
    ) -> ConsumerName:
        """Find or create the consumer of a group, and with it the stream.

        Args:
            may_be_first: Not if it was another one before the server lost its data: publishers go on as they did.

        Raises:
            Away, SetupError: no answer; the server refuses.
        """
        topic, group = token_of(topic), token_of(group)
        name = f"{topic}+{group}"  # a plus is quoted in both
        try:
            config = await self._find_consumer(connection, name)
            if config is None:
                subjects = [self.subject(topic)] * may_be_first + [self.subject(topic, group)]
                config = await self._create_consumer(connection, name, subjects, lease)
            is_first = config.get("filter_subject") == self.subject(topic)
            if not is_first:
                await self._mark(connection, topic, group)
        except ApiError as error:
            raise self.explain(error, connection) from error
        return ConsumerName(name, config["ack_wait"] / 1_000_000_000, is_first)

    async def _find_consumer(self, connection: NatsConnection, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = (await self.ask(connection, f"CONSUMER.INFO.{self.name}.{name}"))["config"]
        except ApiError as error:
            if error.code not in (_CONSUMER_NOT_FOUND, _STREAM_NOT_FOUND):
                raise
            is_lost = error.code == _STREAM_NOT_FOUND
        else:
            return found
        if is_lost:
            await self.restore(connection)
        return None

    async def _create_consumer(
        self, connection: NatsConnection, name: str, subjects: list[str], lease: float
    ) -> dict[str, Any]:
        """On the first of the subjects that nobody has."""
        config = {
            "name": name,
            "durable_name": name,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "replay_policy": "instant",
            "ack_wait": nanoseconds(lease),
            "max_deliver": -1,
            "max_ack_pending": -1,
            "max_waiting": MAX_WAITING,
        }
        subject, *others = subjects
        call = f"CONSUMER.CREATE.{self.name}.{name}.{subject}"
        body = {"stream_name": self.name, "config": {**config, "filter_subject": subject}}
        try:
            found: dict[str, Any] = (await self.ask(connection, call, body))["config"]
        except ApiError as error:
            if error.code not in _SUBJECT_TAKEN or not others:
                raise
        else:
            return found
        return await self._create_consumer(connection, name, others, lease)

    async def _mark(self, connection: NatsConnection, topic: str, group: str) -> None:
        headers = {"Nats-Expected-Last-Subject-Sequence": "0"}  # stored once, heard by all
        answer = await connection.request(f"{self.name}.g.{topic}.{group}", b"", headers)
        try:
            read_answer(answer)
        except ApiError as error:
            if error.code != _WRONG_SEQUENCE:
                raise

    async def _hear_mark(self, message: Msg) -> None:
        topic, group = message.subject.split(".")[-2:]
        if marks := self._marks.get(topic):
            marks.groups.add(group)

    def marks(self, topic: str) -> Marks:
        """Of a topic, given as a token. From now on, what is set is added there."""
        found = self._marks.get(topic)
        if found is None:
            found = self._marks[topic] = Marks(set())
            if len(self._marks) > REMEMBERED_TOPICS:
                self._marks.popitem(last=False)
        self._marks.move_to_end(topic)
        return found

    async def ask_marks(self, connection: NatsConnection, topic: str) -> Pending:
        """Ask which marks a topic has; `learn_marks` takes the answer."""
        body = json.dumps({"subjects_filter": f"{self.name}.g.{topic}.*"}).encode()
        return await connection.ask(f"{self._api}.STREAM.INFO.{self.name}", body)

    def learn_marks(self, marks: Marks, answer: Msg) -> None:
        """Raises ApiError."""
        subjects = read_answer(answer)["state"].get("subjects") or {}
        marks.groups.update(subject.rpartition(".")[2] for subject in subjects)
        marks.known = True

    def next_subject(self, consumer: ConsumerName) -> str:
        """Where a message of a consumer is asked for."""
        return f"{self._api}.CONSUMER.MSG.NEXT.{self.name}.{consumer.name}"

    # Asking

    async def ask(self, connection: NatsConnection, call: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Raises ApiError and Away."""
        text = b"" if body is None else json.dumps(body).encode()
        return read_answer(await connection.request(f"{self._api}.{call}", text))

    def explain(self, error: ApiError, connection: NatsConnection, topic: str | None = None) -> Exception:
        """What an error means to a caller: Away if it may be better the next time."""
        if error.code in _NO_JETSTREAM:
            return self._no_jetstream(connection)
        if error.code == _MESSAGE_TOO_LARGE:
            return TooLarge(f"The stream {self.name} takes no message of that size", topic=topic)
        if error.code == _NOT_STORED:
            return QueueUnavailable(
                f"The stream {self.name} is full: {error.description}",
                hint="Start more consumers, or raise the limits of the stream at the server.",
                topic=topic,
            )
        if (error.status >= 500 or error.status == 404) and error.code != _NO_CLUSTER:
            return Away(f"JetStream at {connection.address}: {error}")
        return SetupError(f"JetStream at {connection.address} refuses: {error}", stream=self.name)

    def _no_jetstream(self, connection: NatsConnection) -> SetupError:
        return SetupError(
            f"JetStream is not enabled at the NATS server at {connection.address}",
            hint="Start nats-server with -js, or enable it for this account.",
        )
