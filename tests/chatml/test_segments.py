"""Text to segments: blocks, quoted tags, calls that stand or fall, in any chunking."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_call_shapes import SHAPES, TOOLS

from lfm_mlx import chatml
from lfm_mlx.chatml.tags import ALL_TAGS, CALL_END, CALL_START, Tag, Words

CALL = f"{CALL_START}[f(a='x')]{CALL_END}"
ANSWERS = {
    "": [],
    "plain": [("text", "plain")],
    "<think>a</think>b": [("thinking", "a"), ("text", "b")],
    "<think>a</think>": [("thinking", "a")],
    "<think></think>b": [("text", "b")],
    "<think>never closed <|tool_call_start|>": [
        ("thinking", "never closed <|tool_call_start|>"),
    ],
    f"say: {CALL}": [("text", "say: "), ("tool_call", "[f(a='x')]")],
    f"<think>t</think>{CALL}{CALL}": [
        ("thinking", "t"),
        ("tool_call", "[f(a='x')]"),
        ("tool_call", "[f(a='x')]"),
    ],
    f"{CALL}\n{CALL} done": [
        ("tool_call", "[f(a='x')]"),
        ("text", "\n"),
        ("tool_call", "[f(a='x')]"),
        ("text", " done"),
    ],
    "1 < 2 <thin k> </think>": [("text", "1 < 2 <thin k> </think>")],
    "a<<think>b<</think>c": [("text", "a<"), ("thinking", "b<"), ("text", "c")],
    "ends with <thin": [("text", "ends with <thin")],
    "a<think>b</think><think>c": [("text", "a"), ("thinking", "b"), ("thinking", "c")],
    "<think>about '</think>' and `<think>`</think>b": [
        ("thinking", "about '</think>' and `<think>`"),
        ("text", "b"),
    ],
    'it opens with `<think>` and "<|tool_call_start|>"': [
        ("text", 'it opens with `<think>` and "<|tool_call_start|>"'),
    ],
    "<think>I say 'yes'</think>'yes'": [("thinking", "I say 'yes'"), ("text", "'yes'")],
    "'<think>a</think>": [("text", "'"), ("thinking", "a")],
}
IN_STRINGS = (
    "[f(a='</think>')]",
    "[f(a='about </think> and <think> tags')]",
    "[f(a='<|tool_call_end|>')]",
    "[f(a='about <|tool_call_end|> tags', b=1)]",
    "[f(a='one <|tool_call_end|> two <|tool_call_end|> three')]",
    '[{"name": "f", "arguments": {"a": "x <|tool_call_end|> y"}}]',
)
# Pieces of tags and calls among plain text, so that most examples have something to get wrong.
PIECES = st.sampled_from(
    ["<think>", "</think>", "<thi", "nk>", "<", "a", "é", "日本", "\n", "'", "`", " ", CALL_START,
     CALL_END, "<|tool", "_call_", "[f(a=", "'x')]", "[g()]", "f(1"]
)  # fmt: skip
Block = tuple[str, str, tuple[chatml.Call, ...], str | None]


def merged(chunks: list[str], tools: list[dict] | None = None) -> list[Block]:
    """The blocks as wholes: where the stream was cut must not show in them."""
    blocks: list[Block] = []
    for segment in chatml.segments(chunks, tools):
        assert segment.text or segment.calls
        if segment.begins:
            blocks.append((segment.kind, "", (), None))
        kind, text, calls, reason = blocks[-1]
        assert kind == segment.kind
        blocks[-1] = (kind, text + segment.text, calls + segment.calls, reason or segment.reason)
    return blocks


def texts(chunks: list[str], tools: list[dict] | None = None) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text, _, _ in merged(chunks, tools)]


@pytest.mark.parametrize("text", ANSWERS)
def test_segments_of_a_whole_answer(text: str) -> None:
    assert texts([text]) == ANSWERS[text]


@given(st.lists(PIECES, max_size=16), st.data())
def test_any_chunking_gives_the_same_segments(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert merged(chunks) == merged([text]) == merged(list(text))


@given(st.lists(PIECES, max_size=16))
def test_nothing_but_tags_is_lost(pieces: list[str]) -> None:
    any_tag = re.compile("|".join(map(re.escape, ALL_TAGS)))
    written = any_tag.split("".join(pieces))
    found = [part for _, text in texts(pieces) for part in any_tag.split(text)]
    assert "".join(found) == "".join(written)


@pytest.mark.parametrize("call", IN_STRINGS)
def test_a_tag_in_a_string_ends_nothing(call: str) -> None:
    text = f"{CALL_START}{call}{CALL_END}then"
    assert texts([text]) == texts(list(text)) == [("tool_call", call), ("text", "then")]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.what)
def test_a_block_is_its_calls_or_text_with_a_reason(shape) -> None:
    block = f"{CALL_START}{shape.text}{CALL_END}"
    (kind, text, calls, reason), *after = merged(list(f"{block}!"), TOOLS)
    assert after == [("text", "!", (), None)]
    if shape.calls is None:
        assert (kind, text, calls) == ("text", block, ())
        assert reason
    else:
        assert (kind, text, reason) == ("tool_call", shape.text, None)
        assert [(call.name, call.arguments) for call in calls] == shape.calls


def test_a_call_after_one_with_an_open_string_is_read() -> None:
    broken = f"{CALL_START}[f(a='x]{CALL_END}"
    found = merged([f"{broken} again: {CALL}"])
    assert [block[:2] for block in found] == [
        ("text", broken),
        ("text", " again: "),
        ("tool_call", "[f(a='x')]"),
    ]
    assert "string" in (found[0][3] or "")


@pytest.mark.parametrize("text", ["[f(a='x", "[f(a=1", "f(a=1)", "[f(a=1)", ""])
def test_a_call_cut_off_is_text(text: str) -> None:
    ((kind, shown, calls, reason),) = merged([CALL_START + text])
    assert (kind, shown, calls) == ("text", CALL_START + text, ())
    assert reason


def test_a_list_of_calls_that_is_closed_needs_no_tag() -> None:
    assert merged([f"{CALL_START}[f(a=1)]"]) == merged([f"{CALL_START}[f(a=1)]{CALL_END}"])


def test_text_comes_out_as_soon_as_it_cannot_be_a_tag() -> None:
    arrived: list[str] = []
    pieces = iter(["ab", "c<", "d"])
    for segment in chatml.segments(arrived.append(piece) or piece for piece in pieces):
        if segment.text == "ab":
            assert arrived == ["ab"]
    assert texts(["ab", "c<", "d"]) == [("text", "abc<d")]


def test_a_call_comes_out_with_its_end() -> None:
    arrived: list[str] = []
    for segment in chatml.segments(arrived.append(piece) or piece for piece in [CALL, " after"]):
        if segment.kind == "tool_call":
            assert arrived == [CALL]


def test_only_tokens_are_tags_where_tokens_are_known() -> None:
    spelled = [Tag("<think>"), Words("so </think> it "), Words("is"), Tag("</think>"), Words("b")]
    assert texts(spelled) == [("thinking", "so </think> it is"), ("text", "b")]
    assert texts([Words("<think>a</think>")]) == [("text", "<think>a</think>")]
    call = [Tag(CALL_START), Words(f"[f(a=1)]{CALL_END}"), Tag(CALL_END)]
    ((kind, _, _, reason),) = merged([*call])
    assert kind == "text"
    assert reason


def test_as_message_is_what_render_takes() -> None:
    text = f"<think>hm</think>Let me see.{CALL_START}[f(a='x', n=1)]{CALL_END}"
    message = chatml.as_message(chatml.segments([text]))
    assert message["thinking"] == "hm"
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": "x", "n": 1}'}
    assert "thinking" not in chatml.as_message(chatml.segments(["Hi"]))
