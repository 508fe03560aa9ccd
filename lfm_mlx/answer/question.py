"""A prompt that can be answered: checked, in tokens, and with what its answer must be.

    question = ask(tokenizer, config, [{"role": "user", "content": "What is 27 + 58?"}])

Everything that can be wrong with a question is found here, before a model is loaded or run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfm_mlx import chatml
from lfm_mlx.answer.control import Control
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.config import Config
from lfm_mlx.engine.decode import check_prompt, room_for_answer
from lfm_mlx.engine.thinking import Thinking

# The longest answer where nothing else is asked for: thoughts take most of it.
MAX_TOKENS = 16384

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A prompt's tokens and its answer's conditions.

    max_tokens: what was asked for, or what the model's maximum leaves
    constraint: follows one answer, so a Question is answered once; None if nothing is asked
    thinking: whether the prompt ends inside a think block
    """

    prompt: list[int]
    max_tokens: int
    control: Control
    constraint: Thinking | None
    thinking: bool = False


def ask(
    tokenizer: Tokenizer, config: Config, messages: Messages | Sequence[int], *,
    control: Control = Control(), max_tokens: int = MAX_TOKENS, date: str | None = None,  # noqa: B008
) -> Question:  # fmt: skip
    """The question that `messages` put, or that the token ids of a prompt without a template do.

    control: what the answer must be, and the tools on offer
    date: the day the model is told, YYYY-MM-DD; today if None

    Raises InputError for messages that cannot be rendered, a prompt that leaves no room for an
    answer, and for what `control` asks that cannot be followed.
    """
    prompt = prompt_tokens(tokenizer, messages, control, date)
    check_prompt(prompt, config.vocab_size)
    room = room_for_answer(config, len(prompt), max_tokens)
    thinking = chatml.ends_in_thinking(tokenizer, prompt)
    constraint = control.constraint(tokenizer, config.vocab_size, thinking)
    return Question(prompt, room, control, constraint, thinking)


def prompt_tokens(
    tokenizer: Tokenizer,
    messages: Messages | Sequence[int],
    control: Control,
    date: str | None = None,
) -> list[int]:
    """Token ids of the messages in the chat template, the tools in it; ids stay as they are."""
    if messages and isinstance(messages[0], int):
        return list(messages)  # pyright: ignore[reportReturnType] - the first tells the kind
    return chatml.render(tokenizer, messages, tools=control.tools, date=date)  # pyright: ignore[reportArgumentType]
