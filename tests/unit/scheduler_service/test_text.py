"""Tokens to text: whole characters, exact in sum, stop strings across tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from aptserve_scheduler.text.detokenizer import IncrementalDetokenizer
from aptserve_scheduler.text.output import OutputText
from aptserve_scheduler.text.tokenizer import TextCodec, TokenizerError
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizers import TEXT, byte_level_json, sentencepiece_json
from tokenizers import Tokenizer

BYTE_LEVEL = TextCodec(byte_level_json())
SENTENCEPIECE = TextCodec(sentencepiece_json())
SENTENCEPIECE_IDS = Tokenizer.from_str(sentencepiece_json().decode()).get_vocab()
BYTE_LEVEL_SIZE = Tokenizer.from_str(byte_level_json().decode()).get_vocab_size()


def byte_tokens(text: str) -> list[int]:
    return [SENTENCEPIECE_IDS[f"<0x{b:02X}>"] for b in text.encode()]


def pieces(codec: TextCodec, token_ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = IncrementalDetokenizer(codec.decode, prompt or [])
    return [*(detokenizer.push(t) for t in token_ids), detokenizer.flush()]


def test_pieces_are_whole_characters_and_sum_up_to_the_text() -> None:
    parts = pieces(BYTE_LEVEL, BYTE_LEVEL.encode(TEXT))
    assert "".join(parts) == TEXT
    assert not any("\ufffd" in part for part in parts)


def test_a_character_spread_over_tokens_comes_with_its_last_one() -> None:
    assert pieces(SENTENCEPIECE, byte_tokens("😀")) == ["", "", "", "😀", ""]


def test_a_broken_character_at_the_end_is_replaced() -> None:
    assert pieces(SENTENCEPIECE, byte_tokens("😀")[:2])[-1] == "\ufffd\ufffd"


def test_a_space_belongs_to_the_word_behind_a_prompt() -> None:
    hello, world = SENTENCEPIECE_IDS["▁hello"], SENTENCEPIECE_IDS["▁world"]
    assert pieces(SENTENCEPIECE, [world], prompt=[hello]) == [" world", ""]
    assert pieces(SENTENCEPIECE, [hello, world]) == ["hello", " world", ""]


def test_special_tokens_have_no_text_and_cost_no_space() -> None:
    hello, world = SENTENCEPIECE_IDS["▁hello"], SENTENCEPIECE_IDS["▁world"]
    assert "".join(pieces(SENTENCEPIECE, [hello, 2, 2, world])) == "hello world"


def test_a_character_that_breaks_an_earlier_run_loses_nothing() -> None:
    tokens = [*byte_tokens("é"), SENTENCEPIECE_IDS["<0xFF>"], SENTENCEPIECE_IDS["!"]]
    assert "".join(pieces(SENTENCEPIECE, tokens)) == "é\ufffd!"


def test_tokens_beyond_the_tokenizer_have_no_text() -> None:
    assert pieces(BYTE_LEVEL, [10_000]) == ["", ""]


def test_endless_garbage_is_let_go_in_time() -> None:
    garbage = [SENTENCEPIECE_IDS["<0xFF>"]] * 200
    parts = pieces(SENTENCEPIECE, garbage)
    assert "".join(parts) == "\ufffd" * 200
    assert sum(1 for part in parts if part) >= 3


@given(st.lists(st.integers(0, BYTE_LEVEL_SIZE - 1), max_size=50))
def test_any_tokens_sum_up_to_the_decoded_whole(token_ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@given(
    st.lists(st.integers(0, BYTE_LEVEL_SIZE - 1), max_size=40),
    st.lists(st.sampled_from(["e", "lo", " w", "\ufffd", "é"]), max_size=3),
    st.integers(0, 40),
)
def test_a_resumed_text_goes_on_where_it_broke(
    token_ids: list[int], stops: list[str], cut: int
) -> None:
    whole = OutputText(BYTE_LEVEL.decode, [], stops)
    first, second = whole.push(token_ids[:cut]), whole.push(token_ids[cut:])
    resumed = OutputText(BYTE_LEVEL.decode, [], stops)
    assert resumed.push(token_ids[:cut]).text == first.text
    assert resumed.push(token_ids[cut:]) == second
    assert resumed.flush() == whole.flush()


def test_a_stop_string_across_tokens_counts_the_token_that_completed_it() -> None:
    token_ids = BYTE_LEVEL.encode("hello world, hello tokens!")
    output = OutputText(BYTE_LEVEL.decode, [], ["rld, h"])
    deltas = [output.push([t]) for t in token_ids]
    matched = next(i for i, d in enumerate(deltas) if d.matched_stop_string)
    assert "".join(d.text for d in deltas) == "hello wo"
    assert "rld, h" in BYTE_LEVEL.decode(token_ids[: matched + 1])
    assert "rld, h" not in BYTE_LEVEL.decode(token_ids[:matched])
    assert [d.num_tokens for d in deltas] == [1] * (matched + 1) + [0] * (
        len(token_ids) - matched - 1
    )
    assert output.flush().text == ""


def test_tokens_behind_a_match_in_one_push_do_not_count() -> None:
    token_ids = BYTE_LEVEL.encode("hello world")
    delta = OutputText(BYTE_LEVEL.decode, [], ["h"]).push(token_ids)
    assert (delta.text, delta.num_tokens, delta.matched_stop_string) == ("", 1, "h")


@pytest.mark.parametrize("bad", [b"", b"{}", b"\xff", b"[1]"])
def test_a_tokenizer_that_cannot_be_loaded_says_so(bad: bytes) -> None:
    with pytest.raises(TokenizerError):
        TextCodec(bad)


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    tokenizer = Tokenizer.from_str(byte_level_json().decode())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    codec = TextCodec(tokenizer.to_str().encode())
    assert codec.encode(TEXT) == BYTE_LEVEL.encode(TEXT)


def test_a_long_prompt_lets_other_threads_run() -> None:
    num_turns = 0
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(BYTE_LEVEL.encode, "hello world " * 20_000)
        while wait([job], timeout=0.001).not_done:
            num_turns += 1
    assert num_turns >= 5
    assert BYTE_LEVEL.decode(job.result()) == "hello world " * 20_000
