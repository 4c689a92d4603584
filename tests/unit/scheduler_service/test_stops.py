"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

import re
from itertools import pairwise

from aptserve_scheduler.text.stops import StopMatcher
from hypothesis import given
from hypothesis import strategies as st

SHORT = st.text(alphabet="ab", min_size=1, max_size=4)
STOPS = st.lists(SHORT, min_size=1, max_size=4)
TEXTS = st.text(alphabet="abc", max_size=30)


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """Everything that goes out for these pieces, and the match."""
    matcher = StopMatcher(stops)
    out = ""
    for piece in pieces:
        scan = matcher.push(piece)
        out += scan.text
        if scan.matched is not None:
            return out, scan.matched
    return out + matcher.flush(), None


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The rule by brute force: the first end of any stop string, there the longest."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({c % (len(text) + 1) for c in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def test_without_stop_strings_everything_goes_out_at_once() -> None:
    assert StopMatcher([]).push("abc").text == "abc"


def test_a_match_across_pieces_ends_the_text_before_it() -> None:
    assert run(["END"], ["one E", "N", "D two"]) == ("one ", "END")


def test_a_beginning_that_leads_nowhere_is_let_go() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E").text == "the "
    assert matcher.push("N").text == ""
    assert matcher.push("G").text == "ENG"
    assert matcher.flush() == ""


def test_what_is_held_back_comes_with_the_flush() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("line\n").text == "line"
    assert matcher.flush() == "\n"


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert run(["abcd", "bc"], ["xabcdx"]) == ("xa", "bc")


def test_of_two_complete_at_once_the_longer_counts() -> None:
    assert run(["c", "abc"], ["xabc"]) == ("x", "abc")


@given(STOPS, TEXTS, st.lists(st.integers(0, 30), max_size=6))
def test_the_cut_of_the_pieces_does_not_matter(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    assert run(stops, split(text, cuts)) == expected(stops, text)


@given(STOPS, TEXTS)
def test_no_more_is_held_back_than_could_become_a_match(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    scan = matcher.push(text)
    if scan.matched is None:
        held = text[len(scan.text) :]
        assert not held or any(s.startswith(held) and s != held for s in stops)
        assert not re.search("|".join(map(re.escape, stops)), text)
