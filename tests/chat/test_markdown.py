"""What a terminal shows of Markdown: every word of it, at every width."""

import io
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lfm_mlx.chat.markdown import Markdown, Part, narrowed

WHOLE = [
    ("Wrap it in a <div> tag.", "<div>"),
    ("Use List<String> names = new ArrayList<>();", "List<String> names = new ArrayList<>();"),
    ("<details>\n<summary>Steps</summary>\nPress it.\n</details>\nWait.", "Press it."),
    ("<!-- note -->The answer is 5.", "<!-- note -->The answer is 5."),
    ("The tag <think> opens a thought.", "<think>"),
    ("So 2*3*4 = 24, 2**3**4 too.", "2*3*4 = 24, 2**3**4"),
    ("Edit __init__.py, snake_case and _private_ first.", "__init__.py, snake_case and _private_"),
    ("See [the docs](http://a.example/b_c).", "the docs (http://a.example/b_c)"),
    ("f[x](y) and a[0](1)", "f[x](y) and a[0](1)"),
    ("![a cat](http://a.example/cat.png)", "http://a.example/cat.png"),
    ("[ref]: http://a.example", "[ref]: http://a.example"),
    ("[text](http://a.example 'The title')", "The title"),
    ("1. one\n\n3. three", "3. three"),
    ("7) seven", "7) seven"),
    ("3.", "3."),
    (r"\(x\) \[y\] \frac{1}{2} \\ 50\%", r"\(x\) \[y\] \frac{1}{2} \\ 50\%"),
    ("$a*b*c$ and $x_1 + x_2$", "$a*b*c$ and $x_1 + x_2$"),
    ("&lt;b&gt; &nbsp; &copy;", "&lt;b&gt; &nbsp; &copy;"),
    ("*.py,*.txt src/**/*.py,lib/**/*.js", "*.py,*.txt src/**/*.py,lib/**/*.js"),
    ("(*x)*(*y) f(*args,**kwargs)", "(*x)*(*y) f(*args,**kwargs)"),
    ("```cpp title\nx\n```", "cpp title"),
    ("| a | b |\n|---|---|\n| 1 | 2 | extra |", "extra"),
    ("<https://a.example>", "<https://a.example>"),
    ("~~gone~~", "~~gone~~"),
]


def shown(text: str, width: int = 60, part: Part = Part()) -> str:  # noqa: B008
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Markdown(text, part))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("text", "words"), WHOLE)
def test_what_markdown_would_hide_is_shown(text: str, words: str) -> None:
    assert words in shown(text)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "a",
                "b1",
                "\n",
                "- ",
                "1. ",
                "3) ",
                "```",
                "| a | b |\n|---|---|\n",
                "| 1 | 2 | x |\n",
                "> ",
                "    ",
                " ",
                "# ",
                "*",
                "**",
                "_",
                "<b>",
                "[x](http://y)",
                "[z](q)",
                "---\n",
                "\\",
                "\t",
                "`",
                "~~~",
                "&lt;",
                "![i](u)",
                "ü",
                "漢字",
                ":",
            ]
        ),
        max_size=40,
    ),
    st.sampled_from([30, 31, 80, 250]),
)
def test_every_letter_is_drawn_within_the_terminal(parts: list[str], width: int) -> None:
    text = "".join(parts)
    drawn = shown(text, width)
    assert not Counter(filter(str.isalnum, text)) - Counter(drawn)
    # An east Asian character is two cells wide, and Python counts one.
    assert all(len(line) <= width for line in drawn.splitlines())


def test_emphasis_around_words_is_drawn_as_such() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    console.print(Markdown("**bold**, *slanted* and (**both *at once***)."))
    drawn = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "\x1b[1mbold\x1b[0m" in drawn
    assert "\x1b[3mslanted\x1b[0m" in drawn
    assert "*" not in drawn


def test_lines_end_where_they_ended() -> None:
    assert [line.rstrip() for line in shown("roses\nviolets  \nsugar").splitlines()] == [
        "roses", "violets", "sugar"
    ]  # fmt: skip


def test_a_table_too_wide_is_folded_or_shown_as_it_is() -> None:
    table = "| name | description |\n|---|---|\n| a | " + "word " * 20 + "|"
    assert shown(table, 30).count("word") == 20
    many = "|" + "|".join("abcdefghijklmnop") + "|\n|" + "---|" * 16 + "\n|" + "word|" * 16
    assert shown(many, 30).replace("\n", "").count("word") == 16


@given(st.lists(st.integers(1, 99), min_size=1, max_size=9), st.integers(1, 200))
def test_columns_give_room_the_widest_first(widths: list[int], room: int) -> None:
    found = narrowed(widths, room)
    assert sum(found) <= room or all(width <= 3 for width in found)
    assert all(new <= old for new, old in zip(found, widths, strict=True))
    if sum(widths) <= room:
        assert found == widths


def test_a_part_of_a_block_leaves_out_what_was_drawn() -> None:
    code = shown("```python\ny = 2\n", part=Part(before="x = '''\n", goes_on=True))
    assert "y = 2" in code
    assert "x =" not in code
    assert "python" not in code
    rows = shown("| a | b |\n|---|---|\n| 1 | 2 |\n", part=Part(widths=(6, 3), goes_on=True))
    assert "a" not in rows
    assert rows.split() == ["1", "2"]
