"""Streaming text: whole characters only, and stop strings across token edges."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from plans.errors import UsageError
from runtime.generate.text import REPLACEMENT, WINDOW_TOKENS, StopMatcher, TextStream

SHIPPED = Path(__file__).parents[2] / "checkpoint" / "python-llama"


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A byte-level tokenizer: every token is one byte."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def decode_words(token_ids: Sequence[int]) -> str:
    """A sentencepiece-like tokenizer: words with a leading space, which is dropped at the very beginning."""
    return "".join(f" w{token}" for token in token_ids)[1:]


def stream(token_ids: Sequence[int], **options: object) -> list[str]:
    text = TextStream(decode_bytes, **options)  # type: ignore[arg-type]
    return [*(text.push(token) for token in token_ids), text.finish()]


@given(st.text())
def test_the_pieces_add_up_to_the_text(text: str) -> None:
    pieces = stream(text.encode("utf-8", errors="surrogatepass") if text.isascii() else text.encode(errors="replace"))
    assert "".join(pieces) == text.encode(errors="replace").decode()


@pytest.mark.row("R8")
@given(st.lists(st.integers(0, 255), max_size=200))
def test_any_bytes_stream_to_what_they_decode_to(token_ids: list[int]) -> None:
    assert "".join(stream(token_ids)) == decode_bytes(token_ids)


def test_a_character_appears_only_when_its_last_byte_does() -> None:
    assert stream("é€😀".encode()) == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_an_incomplete_end_shows_as_one_replacement_character() -> None:
    assert stream("a😀".encode()[:-1]) == ["a", "", "", "", REPLACEMENT]


def test_long_texts_are_decoded_through_a_window() -> None:
    longest = 0

    def decode(token_ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode_bytes(token_ids)

    text = "añ😀b" * 500
    writer = TextStream(decode)
    assert "".join(writer.push(byte) for byte in text.encode()) + writer.finish() == text
    assert longest <= WINDOW_TOKENS + 8


def test_the_first_space_depends_on_the_prompt() -> None:
    assert TextStream(decode_words, prompt_ids=[1, 2]).push(3) == " w3"
    assert TextStream(decode_words).push(3) == "w3"


@given(st.integers(0, 2**32))
def test_the_shipped_tokenizer_streams_what_it_decodes(seed: int) -> None:
    import random

    tokenizer = _tokenizer()
    token_ids = random.Random(seed).choices(range(4, len(tokenizer)), k=80)
    text = TextStream(tokenizer.decode)
    assert "".join(text.push(token) for token in token_ids) + text.finish() == tokenizer.decode(token_ids)


_CACHE: list[object] = []


def _tokenizer() -> object:
    if not _CACHE:
        _CACHE.append(AutoTokenizer.from_pretrained(SHIPPED))
    return _CACHE[0]


def run(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.finish(), matcher.is_stopped


def test_a_stop_string_across_pieces_ends_the_text_before_it() -> None:
    assert run(["END"], ["abcE", "N", "Dxyz"]) == ("abc", True)


def test_a_beginning_that_goes_on_otherwise_is_printed() -> None:
    assert run(["END"], ["abE", "Nx", "E"]) == ("abENxE", False)


def test_of_overlapping_stop_strings_the_one_complete_first_wins() -> None:
    assert run(["bc", "abcd"], ["xxabcd"]) == run(["bc", "abcd"], list("xxabcd")) == ("xxa", True)
    assert run(["c", "bc"], ["abc"]) == ("a", True)
    assert run(["aab"], ["aa", "ab"]) == ("a", True)


def test_nothing_follows_a_stop_string() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("c") == ""


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopMatcher(["\n\nQ:"])
    assert matcher.push("hello\n") == "hello"
    assert matcher.push("world") == "\nworld"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="a stop string is empty"):
        StopMatcher(["a", ""])


@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_streamed_stopping_equals_searching_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    cuts = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert run(stops, pieces) == (whole[: min(cuts)[1]] if cuts else whole, bool(cuts))
