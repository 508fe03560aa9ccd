"""Markdown in pieces: the same however it came, and each given once."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.chat.markdown import PARSER
from lfm_mlx.chat.pieces import TOGETHER, Cutter, Piece, blocks

PARTS = [
    "a",
    "b1",
    "\n",
    "\n",
    "- ",
    "1. ",
    "3) ",
    "```",
    "```py\n",
    "~~~",
    "| a | b |\n|---|---|\n",
    "| 1 | 2 |\n",
    "> ",
    "    ",
    "  ",
    " ",
    "# ",
    "*",
    "<b>",
    "[x](http://y)",
    "---\n",
    "===\n",
    "\\",
    "\t",
    "`",
]
ROWS = "| a | b |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(47))
CODE = "```python\n" + "".join(f"x = {n}\n" for n in range(47))
texts = st.lists(st.sampled_from([*PARTS, ROWS, CODE, CODE + "```\n"]), max_size=40).map("".join)


def cut(*texts: str) -> list[Piece]:
    cutter = Cutter()
    given = [piece for text in texts for piece in cutter.add(text)]
    return [*given, *cutter.close()]


@settings(deadline=None)
@given(texts, st.lists(st.integers(0, 1000), max_size=30))
def test_however_the_text_comes_its_pieces_are_the_same(text: str, cuts: list[int]) -> None:
    ends = [0, *sorted(min(end, len(text)) for end in cuts), len(text)]
    assert cut(*(text[a:b] for a, b in pairwise(ends))) == cut(text)


@given(texts)
def test_blocks_are_the_whole_text(text: str) -> None:
    assert "".join(line for block in blocks(text) for line in block.lines) == text


@pytest.mark.parametrize(("head", "text"), [(1, CODE + "```\n"), (2, ROWS)])
def test_a_long_block_is_settled_while_it_comes(head: int, text: str) -> None:
    cutter = Cutter()
    lines = text.splitlines(keepends=True)
    given = [piece for line in lines[: head + 2 * TOGETHER + 1] for piece in cutter.add(line)]
    assert [piece.source.count("\n") for piece in given] == [head + TOGETHER] * 2
    assert [piece.part.goes_on for piece in given] == [False, True]
    assert [piece.joins for piece in given] == [False, True]
    assert len(cutter.open(1000).source) < len(text) / 2
    if head == 2:
        assert given[0].part.widths == given[1].part.widths == (2, 3)
    else:
        assert given[1].part.before == "".join(lines[1 : 1 + TOGETHER])


def test_items_of_a_list_are_settled_one_by_one() -> None:
    cutter = Cutter()
    assert [*cutter.add("- one\n  - in one\n")] == []
    (one,) = cutter.add("- two\n")
    assert (one.source, one.joins) == ("- one\n  - in one\n", False)
    two, after = cut("- one\n- two\n", "\nafter\n")[1:]
    assert (two.joins, after.joins) == (True, False)


def test_the_open_end_of_a_long_paragraph_has_a_bound() -> None:
    cutter = Cutter()
    assert [*cutter.add("word " * 10_000)] == []
    assert len(cutter.open(2000).source) <= 2000
    assert cutter.open(2000).source.endswith("word ")


@pytest.mark.parametrize("begin", ["", "- one\n", "> quoted\n", CODE, ROWS])
def test_reading_costs_what_is_new(begin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the lines are read about ten times, not a hundred."""
    read = 0
    parse = "lfm_mlx.chat.pieces.PARSER"

    class Counting:
        def parse(self, text: str) -> list:
            nonlocal read
            read += len(text)
            return PARSER.parse(text)

    monkeypatch.setattr(parse, Counting())
    costs = []
    for count in (200, 2000):
        read, cutter = 0, Cutter()
        line = ROWS.splitlines(keepends=True)[5] if begin == ROWS else "  - x and y\n"
        for text in (begin, *[line] * count):
            list(cutter.add(text))
        costs.append(read)
    assert costs[1] < 25 * costs[0]
