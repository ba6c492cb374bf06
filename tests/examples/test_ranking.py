"""Splitting and ranking, as functions."""

from __future__ import annotations

import time

import pytest

from llama_corral.examples.digesting import sources
from llama_corral.examples.digesting.ranking import keywords, pick, split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("No full stop", ["No full stop"]),
        ("One. Two! Three? Four… Five.", ["One.", "Two!", "Three?", "Four…", "Five."]),
        ("Dr. Ng met J. S. Bach. He left.", ["Dr. Ng met J. S. Bach.", "He left."]),
        ("It costs 3.5 dollars, e.g. here, approx. daily.", ["It costs 3.5 dollars, e.g. here, approx. daily."]),
        (
            'He said "Go!" Then he (maybe) went. (Yes.) Fine.',
            ['He said "Go!"', "Then he (maybe) went.", "(Yes.)", "Fine."],
        ),
        ("Over two\nlines. A title\n\nand a paragraph", ["Over two lines.", "A title", "and a paragraph"]),
        ("Привет мир. Как дела? т.е. что", ["Привет мир.", "Как дела? т.е. что"]),
    ],
)
def test_split_sentences(text: str, sentences: list[str]):
    assert split_sentences(text) == sentences


def test_central_sentences_are_picked_and_fragments_are_not():
    text = [
        "Title of it all",
        "The lighthouse keeper lights the lamp of the lighthouse each evening.",
        "My brother ate some bread with cheese yesterday.",
        "The lamp of the lighthouse warns all ships at night.",
    ]
    picked = pick([text], 9)
    assert {best.position for best in picked} == {1, 2, 3}
    assert picked[-1].position != 1
    assert picked[0].position in (1, 3)


def test_equal_sentences_are_picked_once_before_others():
    text = [
        "Ships wait outside of the harbour.",
        "Ships wait outside of the harbour.",
        "The baker sells fresh bread daily.",
    ]
    assert [best.position for best in pick([text], 2)] == [0, 2]


def test_every_text_gets_its_turn():
    long = [f"The harbour has {word} ships in winter time." for word in ("many", "big", "old", "red", "new", "fast")]
    short = ["Bakers sell fresh bread to hungry sailors."]
    assert {best.text for best in pick([long, short], 2)} == {0, 1}


def test_keywords_join_the_forms_of_a_word():
    assert keywords([["The tide rises and the tides fall.", "A tide's range differs.", "The tide turns."]], 1) == [
        "tide"
    ]


def test_more_than_there_is_gives_what_there_is():
    assert pick([], 5) == []
    assert pick([[]], 5) == []
    assert keywords([], 5) == []


@pytest.mark.parametrize(
    "pattern", [".", "A. ", "*a ", "[", "\n", "- ", "```\n", "a. \n", " ", "[a](", "_", "`a`", "(", "a ", "é!"]
)
def test_an_odd_text_takes_no_more_than_linear_time(pattern: str, tmp_path):
    """A pattern whose time grows with the square of its length takes minutes for this; ten seconds are generous."""
    path = tmp_path / "odd.md"
    path.write_text(pattern * (200_000 // len(pattern)) + "x")
    start = time.perf_counter()
    sentences = sources.read(str(path), 1_000_000).sentences()
    pick([sentences], 50)
    assert time.perf_counter() - start < 10
