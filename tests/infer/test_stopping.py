"""Stop strings: the same cut as a search in the whole text, with nothing shown too early."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from formary.infer.stopping import StopStrings

letters = st.text(alphabet="ab c", max_size=6)


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; the longest where several end together."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(st.lists(letters, max_size=12), st.lists(letters.filter(bool), max_size=3))
def test_pieces_shown_are_the_text_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops)
    shown = "".join([watch.push(piece) for piece in pieces])
    assert shown + watch.flush() == cut("".join(pieces), stops)
    assert (watch.found is not None) == any(stop in "".join(pieces) for stop in stops)


@given(st.lists(letters, max_size=12), st.lists(letters.filter(bool), min_size=1, max_size=3))
def test_text_is_withheld_only_while_it_may_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    watch, shown, read = StopStrings(stops), "", ""
    for piece in pieces:
        shown += watch.push(piece)
        read += piece
        if watch.found is not None:
            break
        withheld = read[len(shown) :]
        assert read.startswith(shown)
        assert withheld == "" or any(stop.startswith(withheld) for stop in stops)


def test_a_stop_string_may_span_tokens() -> None:
    watch = StopStrings(["\n\nUser:"])
    assert [watch.push(piece) for piece in ("Hi", "\n", "\nUs", "er", ": x")] == ["Hi", "", "", "", ""]
    assert watch.found == "\n\nUser:"
