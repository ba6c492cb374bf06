"""How a topic is kept in Redis, and the steps on it that nobody may see half done.

All keys of a topic begin with `corral:{TOPIC}:`, so that they are in one slot wherever keys are spread over slots:

* `groups`: a set, the groups that are known;
* `fresh:GROUP`: a stream of what was published and nobody has acknowledged;
* `returned:GROUP`: a stream of what came back (nacked, or its consumer left or died), to be delivered before the fresh;
* `unclaimed`: a stream of what was published before any group was known. It becomes the first group's `fresh`.

A stream for each group, because an entry is deleted when it is acknowledged: so a stream is as long as what is open, it
never has to be trimmed, and its length is what the limit of messages counts. What comes back moves to the other stream
under a new id. So an entry that is pending belongs to the consumer it was first delivered to, for good: whoever acks or
moves it has to ask only whether it is still pending.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha1
from typing import Any, Final, NamedTuple

from coredis.exceptions import NoScriptError

Argument = bytes | str | int

FIELD: Final = b"message"
"""The field of an entry that holds the message as JSON."""


class Keys(NamedTuple):
    """Where one group of a topic is kept."""

    groups: bytes
    unclaimed: bytes
    fresh: bytes
    returned: bytes

    @classmethod
    def of(cls, topic: str, group: str) -> Keys:
        prefix, name = prefix_of(topic), group.encode()
        return cls(prefix + b"groups", prefix + b"unclaimed", prefix + b"fresh:" + name, prefix + b"returned:" + name)


def prefix_of(topic: str) -> bytes:
    """What the keys of a topic begin with."""
    return b"corral:{%b}:" % topic.encode()


class Script:
    """A script that runs in the server, all or nothing for everybody else. Sent as a whole only if the server has not
    seen it yet."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()
        self._sha = sha1(self._text, usedforsecurity=False).hexdigest().encode()

    async def run(self, ask: Callable[..., Awaitable[Any]], keys: tuple[bytes, ...], *args: Argument) -> Any:
        """Call it through `ask`, which sends a command and returns the answer."""
        try:
            return await ask(b"EVALSHA", self._sha, len(keys), *keys, *args)
        except NoScriptError:
            return await ask(b"EVAL", self._text, len(keys), *keys, *args)


# Errors of a script do not undo what it has done: each adds first and removes last.

PUBLISH: Final = Script("""
-- groups; prefix, limit, field, message. Answers the length of a line that is full, else nothing.
local lines = redis.call('SMEMBERS', KEYS[1])
if #lines == 0 then
  local length = redis.call('XLEN', ARGV[1] .. 'unclaimed')
  if length >= tonumber(ARGV[2]) then return length end
  redis.call('XADD', ARGV[1] .. 'unclaimed', '*', ARGV[3], ARGV[4])
  return false
end
for _, group in ipairs(lines) do
  local length = redis.call('XLEN', ARGV[1] .. 'fresh:' .. group) + redis.call('XLEN', ARGV[1] .. 'returned:' .. group)
  if length >= tonumber(ARGV[2]) then return length end
end
for _, group in ipairs(lines) do
  redis.call('XADD', ARGV[1] .. 'fresh:' .. group, '*', ARGV[3], ARGV[4])
end
return false
""")

JOIN: Final = Script("""
-- groups, unclaimed, fresh, returned; group, consumer, milliseconds of silence after which a name is forgotten.
if redis.call('SADD', KEYS[1], ARGV[1]) == 1 and redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('RENAMENX', KEYS[2], KEYS[3])
end
for i = 3, 4 do
  local made = redis.pcall('XGROUP', 'CREATE', KEYS[i], ARGV[1], '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
  for _, found in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[i], ARGV[1])) do
    if found[2] ~= ARGV[2] and found[4] == 0 and found[6] > tonumber(ARGV[3]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[i], ARGV[1], found[2])
    end
  end
end
return false
""")

ACK: Final = Script("""
-- fresh, returned; group, number of ids of fresh, ids of fresh, ids of returned.
local split = 2 + tonumber(ARGV[2])
for i, bounds in ipairs({{3, split}, {split + 1, #ARGV}}) do
  if bounds[1] <= bounds[2] then
    redis.call('XACK', KEYS[i], ARGV[1], unpack(ARGV, bounds[1], bounds[2]))
    redis.call('XDEL', KEYS[i], unpack(ARGV, bounds[1], bounds[2]))
  end
end
return false
""")

_GIVE_BACK: Final = """
local function give_back(key, id)
  if #redis.call('XPENDING', key, ARGV[1], id, id, 1) == 0 then return end
  local found = redis.call('XRANGE', key, id, id)
  if found[1] then redis.call('XADD', KEYS[2], '*', unpack(found[1][2])) end
  redis.call('XACK', key, ARGV[1], id)
  redis.call('XDEL', key, id)
end
"""

NACK: Final = Script(
    _GIVE_BACK
    + """
-- fresh, returned; group, ids as in RELEASE. They come again in this order.
for i = 2, #ARGV do give_back(KEYS[tonumber(string.sub(ARGV[i], 1, 1))], string.sub(ARGV[i], 2)) end
return false
"""
)

RELEASE: Final = Script(
    _GIVE_BACK
    + """
-- fresh, returned; group, consumer, 1 if the consumer leaves, what it keeps: the number of a key and an id in one word.
-- Everything else that it has comes back.
local kept = {}
for i = 4, #ARGV do kept[ARGV[i]] = true end
for i = 2, 1, -1 do
  local start, open = '-', nil
  repeat
    open = redis.call('XPENDING', KEYS[i], ARGV[1], start, '+', 100, ARGV[2])
    for _, entry in ipairs(open) do
      if not kept[i .. entry[1]] then give_back(KEYS[i], entry[1]) end
      start = '(' .. entry[1]
    end
  until #open < 100
  if ARGV[3] == '1' then redis.call('XGROUP', 'DELCONSUMER', KEYS[i], ARGV[1], ARGV[2]) end
end
return false
"""
)

SWEEP: Final = Script(
    _GIVE_BACK
    + """
-- fresh, returned; group, milliseconds of a lease, limit. What was open for longer than the lease of its consumer, which is
-- in the consumer's name, comes back. Answers how much that was.
local moved, limit = 0, tonumber(ARGV[3])
for i = 2, 1, -1 do
  local start, silent = '-', nil
  repeat
    silent = redis.call('XPENDING', KEYS[i], ARGV[1], 'IDLE', ARGV[2], start, '+', 100)
    for _, entry in ipairs(silent) do
      if entry[3] >= tonumber(string.match(entry[2], ':(%d+)$') or ARGV[2]) then
        give_back(KEYS[i], entry[1])
        moved = moved + 1
      end
      start = '(' .. entry[1]
    end
  until #silent < 100 or moved >= limit
end
return moved
"""
)
