"""Text from outside: whatever Python holds becomes text that can be encoded."""

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx import chatml
from lfm_mlx.answer.control import Control
from lfm_mlx.chat.plain import Plain
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.cli import streams
from lfm_mlx.load import load_tokenizer
from lfm_mlx.text import map_text, well_formed

# st.text() alone leaves surrogates out.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
TOKENIZER = load_tokenizer(DEMO_FOLDER)
DAY = "2026-01-02"


@given(ANY_TEXT | st.text())
def test_every_text_can_be_encoded(text: str) -> None:
    clean = well_formed(text)
    assert clean.encode().decode() == clean
    assert well_formed(clean) == clean
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        assert clean == text


def test_halves_are_joined_or_replaced() -> None:
    assert well_formed("\ud83d\ude00") == "😀"
    assert well_formed("a\ud83db") == "a\ufffdb"
    assert well_formed("\ude00\ud83d") == "\ufffd\ufffd"


def test_all_text_of_a_value_is_mapped() -> None:
    value: Any = {"\ud83d": ["\udc00", {"b": ("\ud83d", 3, None, True)}]}
    assert map_text(value) == {"\ufffd": ["\ufffd", {"b": ["\ufffd", 3, None, True]}]}


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_any_text_can_be_asked(content: str, result: str, name: str) -> None:
    """Messages, results, ids, arguments and tools' descriptions."""
    call = {"id": name, "function": {"name": "f", "arguments": {name: content}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": content},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": name, "content": result},
    ]
    tools = [{"name": "f", "description": content, "parameters": {"properties": {name: {}}}}]
    ids = chatml.render(TOKENIZER, messages, tools=tools, date=DAY)
    assert ids == chatml.render(TOKENIZER, map_text(messages), tools=map_text(tools), date=DAY)


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_a_line_of_bytes_that_are_not_text(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO(b"caf\xe9" + ending.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data, "utf-8", "strict", newline=""))
    streams.prepare()  # as every command does first
    assert Plain(True).ask() == "caf\ufffd"


def test_a_command_of_lines_that_end_in_crlf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one \\\r\ntwo\r\n", newline=""))
    assert Plain(True).ask() == "one \ntwo"


@given(ANY_TEXT.filter(bool), ANY_TEXT.filter(bool))
def test_any_text_can_be_chosen_or_matched(one: str, other: str) -> None:
    control = Control(choices=(f"1{one}", f"2{other}"))
    assert control.choices == (f"1{well_formed(one)}", f"2{well_formed(other)}")
    assert all(control.choice_tokens(TOKENIZER))
    assert Control(regex=one).regex == well_formed(one)
