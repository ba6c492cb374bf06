"""From texts to a draft: plain data in, plain data out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from . import ranking
from .sources import Text

KEYWORDS = 8


class Quote(BaseModel):
    """A sentence and where it stands: the file, its section there and its number in the file, from 1."""

    text: str
    file: str
    section: str
    position: int
    score: float


class SourceStats(BaseModel):
    """What was found in one file, and how many sentences of it were picked."""

    file: str
    bytes: int
    sentences: int
    words: int
    picked: int
    keywords: list[str]


class Draft(BaseModel):
    """A digest before anybody has seen it. `quotes` are best first: a shorter digest is the beginning of the list."""

    title: str
    quotes: list[Quote]
    keywords: list[str]
    sources: list[SourceStats]

    def shortened(self, count: int) -> Draft:
        """The same with the best `count` quotes."""
        return self.model_copy(update={"quotes": self.quotes[:count]})

    def in_reading_order(self) -> list[Quote]:
        """The quotes as somebody meets them who reads the files one after the other."""
        order = {source.file: number for number, source in enumerate(self.sources)}
        return sorted(self.quotes, key=lambda quote: (order[quote.file], quote.position))

    def statistics(self) -> list[SourceStats]:
        """The sources, with `picked` counted."""
        picked = [quote.file for quote in self.quotes]
        return [source.model_copy(update={"picked": picked.count(source.file)}) for source in self.sources]


def make_draft(texts: Mapping[str, Text], count: int) -> Draft:
    """Picks the best `count` sentences of the texts, which are given with the names of their files."""
    files = list(texts)
    sentences = [texts[file].sentences() for file in files]
    quotes = []
    for best in ranking.pick(sentences, count):
        file = files[best.text]
        quotes.append(
            Quote(
                text=sentences[best.text][best.position],
                file=file,
                section=texts[file].heading_of(best.position),
                position=best.position + 1,
                score=best.score,
            )
        )
    words = ranking.keywords(sentences, KEYWORDS)
    return Draft(
        title=_title(files, words),
        quotes=quotes,
        keywords=words,
        sources=[_statistics(file, texts[file]) for file in files],
    )


def _statistics(file: str, text: Text) -> SourceStats:
    sentences = text.sentences()
    return SourceStats(
        file=file,
        bytes=text.bytes,
        sentences=len(sentences),
        words=sum(len(sentence.split()) for sentence in sentences),
        picked=0,
        keywords=ranking.keywords([sentences], 3),
    )


def _title(files: Sequence[str], words: Sequence[str]) -> str:
    if not files:
        return "Nothing to digest"
    name = files[0] if len(files) == 1 else f"{len(files)} texts"
    return f"Digest of {name}: {', '.join(words[:4])}"


def summarize(draft: Draft) -> tuple[str | None, str | None]:
    """What the configured model writes about the quotes, or None; and why it could not write, if it could not."""
    llm = configured_llm()
    if llm is None or not draft.quotes:
        return None, None
    quotes = "\n".join(f"- {quote.text}" for quote in draft.in_reading_order())
    try:
        return str(
            llm.complete(f"Write a summary of two or three sentences. Use only what stands here:\n{quotes}\n")
        ), None
    except Exception as error:
        # Models fail in as many ways as there are providers, and the digest is complete without them.
        return None, f"{type(error).__name__}: {error}"


def configured_llm() -> Any:
    """The model that the application has set, or None.

    The private field is read because `Settings.llm` would create a default model, which wants a key and a network.
    Where llama-index was never imported nobody can have set a model, and importing it to find that out takes seconds.
    """
    module = sys.modules.get("llama_index.core.settings")
    return None if module is None else module.Settings._llm
