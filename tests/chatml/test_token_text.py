"""Token ids to text, byte by byte, and the tags among them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_mlx import chatml
from lfm_mlx.chatml.tags import ALL_TAGS, Tag, Words
from lfm_mlx.chatml.token_text import byte_letters
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_FOLDER)


def ids_of(tokenizer, *texts: str) -> list[int]:
    return [id for text in texts for id in tokenizer.encode(text, add_special_tokens=False)]


@given(st.text())
def test_streamed_tokens_are_the_text(tokenizer, text: str) -> None:
    stream = chatml.TextStream(tokenizer)
    pieces = [piece for token in ids_of(tokenizer, text) for piece in stream.add(token)]
    assert "".join(pieces + stream.finish()) == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_cut_off_is_replaced_once_at_the_end(tokenizer) -> None:
    stream = chatml.TextStream(tokenizer)
    text = [stream.add(token) for token in ids_of(tokenizer, "né日本🙂")[:-1]]
    assert "\ufffd" not in str(text)
    assert stream.finish() == ["\ufffd"]
    assert stream.finish() == []


def test_a_character_cut_off_by_a_tag_is_replaced_before_it(tokenizer) -> None:
    stream = chatml.TextStream(tokenizer)
    ids = ids_of(tokenizer, "🙂")[:-1] + ids_of(tokenizer, "</think>")
    assert [piece for token in ids for piece in stream.add(token)] == ["\ufffd", "</think>"]


def test_a_tag_is_a_token_and_its_spelling_is_words(tokenizer) -> None:
    for tag in ALL_TAGS:
        stream = chatml.TextStream(tokenizer)
        (token,) = ids_of(tokenizer, tag)
        assert [type(piece) for piece in stream.add(token)] == [Tag]
        spelled = ids_of(tokenizer, tag[:3], tag[3:])
        pieces = [piece for token in spelled for piece in stream.add(token)]
        assert "".join(pieces) == tag
        assert {type(piece) for piece in pieces} == {Words}


def test_a_spelled_tag_stays_in_its_block(tokenizer) -> None:
    ids = ids_of(tokenizer, "<think>", "close with </", "think> then", "</think>", "85")
    stream = chatml.TextStream(tokenizer)
    found = list(chatml.segments(piece for token in ids for piece in stream.add(token)))
    thinking = "".join(segment.text for segment in found if segment.kind == chatml.THINKING)
    assert thinking == "close with </think> then"
    assert found[-1].kind == chatml.TEXT


def test_a_tokenizer_without_the_tags_can_only_spell_them(tokenizer) -> None:
    class Bare:
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def get_added_vocab(self) -> dict[str, int]:
            return {}

    stream = chatml.TextStream(Bare())
    ids = ids_of(tokenizer, "<th", "ink>a</th", "ink>b")
    pieces = [piece for token in ids for piece in stream.add(token)]
    assert [segment.kind for segment in chatml.segments(pieces) if segment.begins] == [
        chatml.THINKING,
        chatml.TEXT,
    ]


def test_byte_letters_are_the_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_letters().values()) == set(ByteLevel.alphabet())
    assert byte_letters()[ord(" ")] == "Ġ"
    assert byte_letters()[ord("\n")] == "Ċ"


class Vocabulary:
    def __init__(self, vocabulary: dict[str, int]):
        self.get_vocab = vocabulary.copy


def test_the_fingerprint_tells_which_id_each_token_has() -> None:
    ours = chatml.vocabulary_fingerprint(Vocabulary({"a": 0, "b": 1}))
    assert chatml.vocabulary_fingerprint(Vocabulary({"b": 1, "a": 0})) == ours
    assert chatml.vocabulary_fingerprint(Vocabulary({"a": 1, "b": 0})) != ours
