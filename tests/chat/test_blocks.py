"""Markdown drawn as it streams: the same in the end however it was cut, and escape_controls."""

import io
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from lfm_mlx.chat.blocks import Called, Prose, Tail, Thought
from lfm_mlx.cli.printer import escape_controls

DOCUMENT = """# A title

A paragraph with *emphasis*
over two lines.
- one
- two

  still two
3. three
4. four

```python
# no title
print("**not bold**")

```
| a | b |
|---|---|
| 1 | 2 |

> quoted

Title below
===
    indented code

And an end with `code` and <b>tags</b>."""
UNFINISHED = ["**bold", "```python\nx = 1\n", "a | b\n--", "[text](http://", "<div", "- ", "\\"]


def printed(*drawings: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=60, height=20, force_terminal=True)
    for drawing in drawings:
        console.print(drawing)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def streamed(pieces: Iterable[str]) -> str:
    block = Prose()
    settled = [drawing for piece in pieces for drawing in block.add(piece)]
    return printed(*settled, *block.close())


@settings(deadline=None)
@given(st.lists(st.integers(0, len(DOCUMENT))))
def test_cut_anywhere_it_is_drawn_the_same(cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(DOCUMENT)]
    pieces = [DOCUMENT[a:b] for a, b in pairwise(ends)]
    assert streamed(pieces) == streamed(DOCUMENT)


def test_blocks_are_parted_by_a_line_and_items_are_not() -> None:
    shown = [line.rstrip() for line in streamed("one\n\n- a\n- b\n\n\n# T\ntwo").splitlines()]
    assert shown[0] == "one"
    assert [bool(line) for line in shown] == [
        True,
        False,
        True,
        True,
        False,
        True,
        False,
        True,
        False,
    ]


def test_what_is_complete_is_settled_at_once() -> None:
    block = Prose()
    assert [*block.add("one\n\n")] == []
    assert "one" in printed(*block.add("two\n"))
    assert "one" not in printed(block.open())
    assert "two" in printed(block.open())


@pytest.mark.parametrize("text", UNFINISHED)
def test_what_is_unfinished_is_drawn_too(text: str) -> None:
    block = Prose()
    for letter in text:
        assert [*block.add(letter)] == []
        printed(block.open())
    assert isinstance(streamed(text), str)


@given(st.text(st.characters(codec="utf-8")))
def test_no_control_character_reaches_the_terminal(text: str) -> None:
    shown = escape_controls(text)
    assert len(shown) == len(text)
    assert all(letter in "\n\t" or letter.isprintable() or ord(letter) >= 0xA0 for letter in shown)


@pytest.mark.parametrize("block", [Prose, Called, lambda: Thought(True)])
def test_no_block_lets_the_model_steer_the_terminal(block) -> None:
    made = block()
    drawings = [*made.add("a\x1b]0;title\x07\x1b[2Jb"), *made.close()]
    shown = printed(*drawings)
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
    assert "␛" in shown


def test_thoughts_are_dim_or_folded() -> None:
    shown, folded = Thought(True), Thought(False)
    for block in (shown, folded):
        assert [*block.add("two words")] == []
    assert "\x1b[2mtwo words" in printed(*shown.close())
    line = printed(*folded.close())
    assert "thought for" in line
    assert "2 words, /think shows them" in line
    assert "two" not in line
    assert [*Thought(True).close()] == [], "an empty block is not worth a line"


def test_the_words_of_a_thought_are_counted_as_they_come() -> None:
    thought = Thought(False)
    for piece in ("on", "e t", "wo\n", " th", "ree", ""):
        assert [*thought.add(piece)] == []
    assert "3 words" in printed(thought.open())


def test_the_tail_of_what_is_open_fits_on_the_screen() -> None:
    block = Thought(True)
    tail = Tail(block, lambda: "the status")
    assert [*block.add("\n".join(map(str, range(10_000))))] == []
    lines = [line for line in printed(tail).splitlines() if line.strip()]
    assert len(lines) == 19
    assert "9999" in lines[-2]
    assert "the status · Ctrl-C stops" in lines[-1]
    assert "\n5000" in printed(*block.close()).replace("\x1b[2m", "\n"), "in the end all is there"
