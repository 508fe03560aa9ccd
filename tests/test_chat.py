"""Text to segments in any chunking, tokens to text byte by byte, and rendering."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_mlx import chat
from lfm_mlx.checkpoint import DEMO_FOLDER
from lfm_mlx.command import InputError
from lfm_mlx.load import load_tokenizer

CALL = "<|tool_call_start|>[f(a='x')]<|tool_call_end|>"
SHAPES = {
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
    "1 < 2 <thin k> </think>": [("text", "1 < 2 <thin k> </think>")],
    "a<<think>b<</think>c": [("text", "a<"), ("thinking", "b<"), ("text", "c")],
    "ends with <thin": [("text", "ends with <thin")],
    "a<think>b</think><think>c": [("text", "a"), ("thinking", "b"), ("thinking", "c")],
}

# Pieces of tags among plain text, so that most examples have something to get wrong.
PIECES = st.sampled_from(
    ["<think>", "</think>", "<thi", "nk>", "<", "a", "é", "日本", "\n", "<|tool_call_start|>",
     "<|tool_call_end|>", "<|tool", "_call_"]
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(DEMO_FOLDER)


@pytest.mark.parametrize("text", SHAPES)
def test_segments_of_a_whole_answer(text: str) -> None:
    assert merged([text]) == SHAPES[text]


@given(st.lists(PIECES, max_size=12), st.data())
def test_any_chunking_gives_the_same_segments(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert merged(chunks) == merged([text]) == merged(list(text))


def merged(chunks: list[str]) -> list[tuple[str, str]]:
    """The blocks as wholes: where the stream was cut must not show in them."""
    blocks: list[tuple[str, str]] = []
    for segment in chat.segments(chunks):
        if segment.begins:
            blocks.append((segment.kind, ""))
        assert blocks[-1][0] == segment.kind
        blocks[-1] = (segment.kind, blocks[-1][1] + segment.text)
    return blocks


def test_text_comes_out_as_soon_as_it_cannot_be_a_tag() -> None:
    arrived: list[str] = []
    pieces = iter(["ab", "c<", "d"])
    for segment in chat.segments(arrived.append(piece) or piece for piece in pieces):
        if segment.text == "ab":
            assert arrived == ["ab"]
    assert merged(["ab", "c<", "d"]) == [("text", "abc<d")]


@given(st.text())
def test_streamed_tokens_are_the_text(tokenizer: object, text: str) -> None:
    stream = chat.TextStream(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_cut_off_is_replaced_once_at_the_end(tokenizer: object) -> None:
    ids = tokenizer.encode("né日本🙂", add_special_tokens=False)  # pyright: ignore
    stream = chat.TextStream(tokenizer)
    text = "".join(stream.add(token) for token in ids[:-1])
    assert "\ufffd" not in text
    assert stream.finish() == "\ufffd"


def test_byte_letters_are_the_tokenizers(tokenizer: object) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(chat.byte_letters().values()) == set(ByteLevel.alphabet())
    assert chat.byte_letters()[ord(" ")] == "Ġ"
    assert chat.byte_letters()[ord("\n")] == "Ċ"


def test_render_starts_once_and_ends_where_the_assistant_speaks(tokenizer: object) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = chat.render(tokenizer, messages)
    text = tokenizer.decode(ids)  # pyright: ignore
    assert text == (
        "<|startoftext|><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(ids[0]) == 1


def test_render_refuses_in_one_line(tokenizer: object) -> None:
    class Bare:
        chat_template = None

    with pytest.raises(InputError, match="no chat template; use --raw"):
        chat.render(Bare(), [{"role": "user", "content": "Hi"}])
    with pytest.raises(InputError, match="refuses the messages"):
        chat.render(tokenizer, [{"role": "user", "content": 27}])
