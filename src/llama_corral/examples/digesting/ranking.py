"""Which sentences say what a text is about: pure functions, no model, no network, the same answer every time.

A sentence is a bag of words, each word weighted by how rare it is (tf-idf). It is *central* when it resembles the sum
of all sentences of its text. Picking goes one by one: each pick makes similar sentences, and those of the same text,
less attractive, so that a digest of several texts says something about each of them. It is made for languages that put
spaces between words, and knows the common words of English.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Vector = Mapping[str, float]

MIN_WORDS = 5
"""Sentences with fewer words than this are headings, labels and remains; they are not ranked."""
MAX_WORDS = 50
"""Longer ones are mostly tables and lists without full stops; they are not ranked either."""

# A sentence ends with one of .!?… , maybe closing quotes or brackets, and then a space; see `_ends_here` for the rest.
# The look-behind keeps a long row of dots from being tried again at each of them.
_BOUNDARY = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’)\]]*\s+")
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Mrs?|Ms|Dr|Prof|St|Sr|Jr|No|Nos|Fig|vs|ca|cf|[eE]\.g|[iI]\.e)\.\s+$")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_PARAGRAPH = re.compile(r"\n\s*\n")

# Such a beginning leans on the sentence before, which the reader of a digest does not see.
_LEANS = re.compile(
    r"(?:it|its|this|that|these|those|they|their|them|he|his|she|her|such|so|but|and|or|also|therefore|however|both|"
    r"here|there|then|thus|another|instead|neither|between|because|once)\b",
    re.IGNORECASE,
)

_STOPWORDS_TEXT = """
    a about above after again against all also although always am among an and another any anybody are around as at
    away be became because become been before being below between both but by can cannot could did do does doing done
    down during each either else enough even ever every few first for from further get gets give given gives go goes
    had has have having he her here hers him his how however i if in instead into is it its itself just last least less
    let like little made make makes many may me might more most much must my neither never next no nobody none nor not
    nothing now of off often on once one only onto or other others our out over own quite rather really same seldom
    several shall she should since so some somebody something still such than that the their them then there
    therefore these they thing things this those though through thus to too towards two under until up upon us use used
    uses using usually very was way we well were what when where whether which while who whole whom whose why will with
    within without would yet you your"""
_STOPWORDS = frozenset(_STOPWORDS_TEXT.split())


@dataclass(frozen=True, slots=True)
class Ranked:
    """A picked sentence: which text, which sentence of it (both from 0), and its score between 0 and 1."""

    text: int
    position: int
    score: float


def split_sentences(text: str) -> list[str]:
    """The sentences of a plain text in order, white space evened out. An empty line always ends a sentence."""
    return [
        " ".join(sentence.split())
        for paragraph in _PARAGRAPH.split(text)
        for sentence in _sentences(paragraph)
        if sentence.strip()
    ]


def _sentences(paragraph: str) -> Iterable[str]:
    start = 0
    for boundary in _BOUNDARY.finditer(paragraph):
        if _ends_here(paragraph, start, boundary.end()):
            yield paragraph[start : boundary.end()]
            start = boundary.end()
    yield paragraph[start:]


def _ends_here(paragraph: str, start: int, end: int) -> bool:
    if _ABBREVIATION.search(paragraph, max(start, end - 10), end):
        return False
    return not paragraph[end : end + 3].lstrip("\"'“‘([")[:1].islower()  # "approx. five" goes on


def terms(sentence: str) -> list[str]:
    """The words of a sentence that carry meaning, folded so that `tide`, `Tides` and `tide's` count as one."""
    words = (re.split("['’]", match.lower())[0] for match in _WORD.findall(sentence))
    return [_fold(word) for word in words if word not in _STOPWORDS and len(word) > 1]


def _fold(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def keywords(texts: Sequence[Sequence[str]], count: int) -> list[str]:
    """The `count` words that stand out: frequent, but not evenly everywhere. Written as they are most often written."""
    bags = [Counter(terms(sentence)) for sentences in texts for sentence in sentences]
    weight = _rarity(bags)
    total = _together(bags)
    best = sorted(total, key=lambda term: (-total[term] * weight[term], term))[:count]
    spellings = Counter(word.lower() for sentences in texts for s in sentences for word in _WORD.findall(s))
    written: dict[str, str] = {}
    for word, _ in sorted(spellings.items(), key=lambda item: (-item[1], item[0])):
        written.setdefault(_fold(word), word)
    return [written.get(term, term) for term in best]


def pick(texts: Sequence[Sequence[str]], count: int) -> list[Ranked]:
    """The `count` best sentences of all texts, best first. Fewer when there are not as many worth ranking."""
    bags = [[Counter(terms(sentence)) for sentence in sentences] for sentences in texts]
    weight = _rarity([bag for text in bags for bag in text])
    vectors: dict[tuple[int, int], Vector] = {}
    scores: dict[tuple[int, int], float] = {}
    for number, text in enumerate(bags):
        centre = _weighted(_together(text), weight)
        for position, bag in enumerate(text):
            if MIN_WORDS <= len(texts[number][position].split()) <= MAX_WORDS and bag:
                vector = _weighted(bag, weight)
                vectors[number, position] = vector
                scores[number, position] = _cosine(vector, centre) * (
                    0.7 if _LEANS.match(texts[number][position]) else 1
                )
    return _pick_varied(vectors, scores, count)


def _pick_varied(
    vectors: Mapping[tuple[int, int], Vector], scores: Mapping[tuple[int, int], float], count: int
) -> list[Ranked]:
    left = dict(scores)
    picked: list[Ranked] = []
    while left and len(picked) < count:
        # The key breaks ties by place, so that equal scores do not make the answer depend on anything else.
        best = min(left, key=lambda key: (-left[key], key))
        del left[best]
        picked.append(Ranked(*best, score=round(scores[best], 4)))
        for key in left:
            left[key] *= 1 - _cosine(vectors[key], vectors[best])
            if key[0] == best[0]:
                left[key] *= 0.6
    return picked


def _together(bags: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for bag in bags:
        total.update(bag)  # not sum(): it would copy the growing total for every sentence
    return total


def _rarity(bags: Sequence[Counter[str]]) -> dict[str, float]:
    found_in = Counter(term for bag in bags for term in bag)
    return {term: math.log(1 + len(bags) / n) for term, n in found_in.items()}


def _weighted(bag: Counter[str], weight: Mapping[str, float]) -> Vector:
    vector = {term: n * weight[term] for term, n in bag.items()}
    length = math.sqrt(sum(value * value for value in vector.values()))
    return {term: value / length for term, value in vector.items()} if length else {}


def _cosine(one: Vector, other: Vector) -> float:
    if len(other) < len(one):
        one, other = other, one
    return sum(value * other[term] for term, value in one.items() if term in other)
