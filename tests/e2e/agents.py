"""The agents that the served processes run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from tests.runtime.agents import add_in_thread, adds, asks, function_agent, team_asks

NATIVE = "anyio" in sys.argv


def talks(messages):
    return f"{len(messages)} messages, the first was {messages[0].content}"


plain = adds()
threads = adds(add_in_thread, native=NATIVE)
adding = adds(native=NATIVE)
asking = asks(native=NATIVE)
team = team_asks(native=NATIVE)
talking = function_agent(talks, native=NATIVE)
