"""What a hostile or broken sender puts into a body: strategies for JSON values and for bytes that nearly are JSON."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

# Numbers that some layer below cannot hold, and texts that some layer below cannot encode or store.
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, -(10**400)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([5e-324, 1e308, -0.0, 1.0]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "\0", "a\0b", "..", "/", "%00", "\u2028\x85", "\u202e", "é" * 300, "x" * 70_000, "{}", "null"]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS.filter(lambda t: len(t) < 1000), inner, max_size=3)
    ),
    max_leaves=6,
)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    """A JSON text of this depth."""
    return opening * depth + "1" + closing * depth


def nearly(value: Any, *, seed: int) -> bytes:
    """The value as JSON, or as something that a JSON parser may choke on. `seed` chooses."""
    text = json.dumps(value)
    good = text.encode()
    spoiled = [
        good,
        good[: len(good) // 2],
        good + good,
        good.replace(b'"', b"'"),
        b"\xef\xbb\xbf" + good,
        text.encode("utf-16"),
        good.replace(b"}", b', "\xff": 1}'),
        good.replace(b"{", b'{"data": NaN, ', 1),
        good.replace(b"{", b'{"action": "new_task", "action": "task_stream", "data": 1, ', 1),
        good.replace(b": ", b': "\\ud800", "x": ', 1),
        good.replace(b": ", b": -Infinity, " + b'"x": ', 1),
        b'{"data": ' + nested(100_000).encode() + b"}",
        b'{"data": ' + nested(100_000, '{"a":', "}").encode() + b"}",
        b'{"data": {"a": ' + b"9" * 10_000 + b"}}",
    ]
    return spoiled[seed % len(spoiled)]
