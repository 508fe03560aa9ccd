"""Everything that can be wrong with a question is said before a model is loaded."""

from dataclasses import replace
from typing import Any

import pytest

from lfm_mlx import Config, chatml
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.question import MAX_TOKENS, ask
from lfm_mlx.checkpoint.folder import Checkpoint
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.errors import InputError
from lfm_mlx.load import load_tokenizer

CONFIG = Config.from_dict(Checkpoint(DEMO_FOLDER).config)
TOKENIZER = load_tokenizer(DEMO_FOLDER)
HELLO = [{"role": "user", "content": "Hello"}]
DAY = "2026-01-02"


def test_a_question_is_rendered_with_its_tools_and_its_day() -> None:
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    question = ask(TOKENIZER, CONFIG, HELLO, control=Control(tools=tools), date=DAY)
    assert question.prompt == chatml.render(TOKENIZER, HELLO, tools=tools, date=DAY)
    assert question.constraint is None


def test_token_ids_stay_as_they_are() -> None:
    assert ask(TOKENIZER, CONFIG, [5, 6, 7]).prompt == [5, 6, 7]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([5, CONFIG.vocab_size], f"the prompt has token {CONFIG.vocab_size}"),
        ([-1], "the prompt has token -1"),
        ([1] * CONFIG.max_position_embeddings, "the model reads at most"),
        ([], "at least one"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(messages: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ask(TOKENIZER, CONFIG, messages)


def test_an_answer_has_the_room_that_the_model_leaves() -> None:
    room = CONFIG.max_position_embeddings - 3
    assert ask(TOKENIZER, CONFIG, [5, 6, 7], max_tokens=9).max_tokens == 9
    assert ask(TOKENIZER, CONFIG, [5, 6, 7]).max_tokens == min(room, MAX_TOKENS)
    large = replace(CONFIG, max_position_embeddings=10 * MAX_TOKENS)
    assert ask(TOKENIZER, large, [5, 6, 7]).max_tokens == MAX_TOKENS
