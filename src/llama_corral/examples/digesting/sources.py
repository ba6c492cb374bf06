"""Finding and reading texts for the digest. Blocking: to be called in a worker thread.

A file that cannot be read is no reason to stop: `read` raises `UnreadableError`, and the digest shows its text.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ranking import split_sentences

SAMPLES = Path(__file__).parent.parent / "texts"
"""The texts that ship with the package."""
SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst"})
"""What is taken from a folder. A file that is named is read whatever its suffix is."""
MAX_FILES = 500
"""More are not looked at: a wrong path (`/`) should cost a moment, not an hour."""

_import_lock = threading.Lock()


class UnreadableError(Exception):
    """The text could not be read; `str()` is the reason, in words for the user."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a text under one heading (empty where there is none)."""

    heading: str
    sentences: list[str]


@dataclass(frozen=True, slots=True)
class Text:
    """A text that was read: its size and its sections in order."""

    bytes: int
    sections: list[Section]

    def sentences(self) -> list[str]:
        return [sentence for section in self.sections for sentence in section.sentences]

    def heading_of(self, position: int) -> str:
        """The heading above the sentence at `position` (from 0)."""
        headings = [section.heading for section in self.sections for _ in section.sentences]
        return headings[position]


def find(paths: Sequence[str] | None, root: str | None = None) -> tuple[list[tuple[str, str]], bool]:
    """The files to read as (name to show, path), each once, and whether there are more than `MAX_FILES`.

    They come in the order of `paths`, folders expanded and sorted by name; relative to `root` if there is one. None
    means all of `root`, or the samples. A path without texts stays in the list: `read` says what is wrong with it.
    """
    if paths is None and root is None:
        return [(path.name, str(path)) for path in sorted(SAMPLES.iterdir()) if path.suffix in SUFFIXES], False
    found: dict[str, str] = {}
    for file in (file for path in paths or ["."] for file in _expand(path, root)):
        if len(found) == MAX_FILES and file not in found:
            return list(found.items()), True
        found[file] = os.path.join(root or "", file)
    return list(found.items()), False


def _expand(name: str, root: str | None) -> Iterator[str]:
    start = os.path.join(root or "", name)
    empty = True
    if "\0" not in name and _may_read(start, root):
        for folder, folders, files in os.walk(start):
            folders[:] = sorted(below for below in folders if not below.startswith("."))
            for file in sorted(files):
                if Path(file).suffix.lower() in SUFFIXES and not file.startswith("."):
                    empty = False
                    yield os.path.normpath(os.path.join(name, os.path.relpath(folder, start), file))
    if empty:
        yield name


def _may_read(path: str, root: str | None) -> bool:
    return root is None or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def read(path: str, max_bytes: int, root: str | None = None) -> Text:
    """The text of a file. Raises `UnreadableError`; so does a path that leads out of `root`."""
    data = _read_bytes(path, max_bytes, root)
    if b"\0" in data:
        raise UnreadableError("a binary file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 (at byte {error.start})") from error
    sections = list(_sections(text, markdown=path.lower().endswith((".md", ".markdown"))))
    if not sections:
        raise UnreadableError("no text in it")
    return Text(len(data), sections)


def _read_bytes(path: str, max_bytes: int, root: str | None) -> bytes:
    try:
        if not _may_read(path, root):
            raise UnreadableError("outside of the folder that may be read")
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UnreadableError(f"a folder without texts ({', '.join(sorted(SUFFIXES))})")
        if not stat.S_ISREG(mode):
            raise UnreadableError("not a regular file")  # reading from a pipe or a device might never end
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    if len(data) > max_bytes:
        raise UnreadableError(f"larger than max_bytes ({max_bytes:,})")
    return data


def _sections(text: str, *, markdown: bool) -> Iterator[Section]:
    for part in _split_markdown(text) if markdown else [text]:
        heading, body = "", part
        if markdown and (match := re.match(r"#{1,6}\s+(.+)\n?", part)):
            heading, body = match[1].strip(), part[match.end() :]
        sentences = split_sentences(_plain(body, markdown=markdown))
        if sentences:
            yield Section(heading, sentences)


def _split_markdown(text: str) -> Iterable[str]:
    """llama-index knows which `#` begins a section and which stands in a block of code.

    Its sentence splitter would be the next step, but it loads data files of nltk, which newer versions of nltk refuse
    where the installer made hard links (uv does); so the sentences are found by `ranking.split_sentences`.
    """
    # Imported late because it takes seconds, and by one thread at a time because a package with circular imports can
    # be seen half loaded by others.
    with _import_lock:
        from llama_index.core.node_parser import MarkdownNodeParser
        from llama_index.core.schema import TextNode

    nodes = MarkdownNodeParser(include_prev_next_rel=False).get_nodes_from_node(TextNode(text=text))
    return [node.get_content() for node in nodes]


def _plain(text: str, *, markdown: bool) -> str:
    """Prose without the signs of its format: what remains reads well in a sentence taken out of its place.

    The lengths are limited so that no text, however odd, takes more than linear time.
    """
    if markdown:
        text = re.sub(r"^(```|~~~).*?(^\1|\Z)", "\n", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"!?\[([^\]]{0,500})\]\([^)]{0,500}\)", r"\1", text)
        text = re.sub(r"^[ \t]*(?:[-*+>]|\d{1,3}\.)[ \t]+", "\n\n", text, flags=re.MULTILINE)
        text = re.sub(r"(?<!\w)(\*\*|__|[*_`])(?=\S)(.{1,300}?)(?<=\S)\1(?!\w)", r"\2", text)
    lines = (
        line for line in text.splitlines() if not re.fullmatch(r"\W*|\s*\|.*|\s*\.\. .*", line) or not line.strip()
    )
    return "\n".join(lines)
