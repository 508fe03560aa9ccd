"""Conversations: what taking back means, and the file they are kept in."""

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_mlx.chat.conversation import FORMAT, Conversation
from lfm_mlx.errors import InputError

CALL = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1", "thinking": "easy"},
    {"role": "user", "content": [{"type": "text", "text": "tw"}, {"type": "text", "text": "o"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_0", "content": "2"},
    {"role": "assistant", "content": "2"},
]


def test_a_question_is_taken_back_with_all_that_followed() -> None:
    talk = Conversation("Be brief.", [*MESSAGES])
    assert talk.last_question() == "two"
    talk.undo()
    assert talk.request() == [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
    talk.undo()
    assert talk.messages == []
    with pytest.raises(InputError, match="nothing was said yet"):
        talk.undo()


@given(system=st.none() | st.text(), texts=st.lists(st.text()))
def test_a_saved_conversation_comes_back(
    tmp_path_factory: pytest.TempPathFactory, system: str | None, texts: list[str]
) -> None:
    file = tmp_path_factory.mktemp("saved") / "talk.json"
    talk = Conversation(system, [{"role": "user", "content": text} for text in texts])
    talk.save(file)
    assert Conversation.load(file) == talk


def test_every_kind_of_message_is_kept_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    Conversation(None, MESSAGES).save(file)
    assert Conversation.load(file).messages == MESSAGES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.json"
    Conversation(None, MESSAGES[:2]).save(file)
    before = file.read_bytes()

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lfm_mlx.files.os.fsync", full)
    with pytest.raises(InputError, match="no space left"):
        Conversation(None, MESSAGES).save(file)
    assert file.read_bytes() == before
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "not a conversation that /save wrote"),
        ('{"format": "another"}', "not a conversation that /save wrote"),
        (json.dumps({"format": FORMAT, "messages": 3}), "expected a list"),
        (json.dumps({"format": FORMAT, "messages": [{"role": "king"}]}), "role is 'king'"),
    ],
)
def test_what_cannot_be_loaded_is_said(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        Conversation.load(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Conversation.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="No such file"):
        Conversation().save(tmp_path / "none" / "talk.json")
