"""The model's side of a conversation: messages → segments of an answer, on one cache.

Whatever the messages are, only what differs from what was read before is read: a question further
on, a tool's result, or an earlier question put otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lfm_mlx import chat, memory, prompt_cache
from lfm_mlx.cache import stored_length
from lfm_mlx.control import Control
from lfm_mlx.decode import room_for_answer
from lfm_mlx.model import Model
from lfm_mlx.model_options import Chosen
from lfm_mlx.sample import Sampler
from lfm_mlx.stream import Statistics, stream

Messages = Sequence[Mapping[str, Any]]


class Responder:
    """Answers, and remembers what it has read.

    statistics: of the last answer, filled while it comes
    """

    def __init__(self, chosen: Chosen, model: Model, max_tokens: int, control: Control):
        self.chosen, self.model = chosen, model
        self.max_tokens, self.control = max_tokens, control
        self.cache: list[Any] = model.make_cache()
        self.statistics = Statistics(0)

    @property
    def context(self) -> int:
        """How many tokens are remembered."""
        return stored_length(self.cache)

    @property
    def longest_context(self) -> int:
        return self.chosen.config.max_position_embeddings

    def answer(
        self, messages: Messages, tools: Messages = (), tool_choice: str = "auto"
    ) -> Iterator[chat.Segment]:
        """The answer to `messages`, as it comes. Raises InputError at once."""
        config, tokenizer = self.chosen.config, self.chosen.tokenizer
        prompt = self._prompt(messages, tools)
        room = room_for_answer(config, len(prompt), self.max_tokens)
        control = replace(self.control, tools=tools, tool_choice=tool_choice)
        constraint = control.constraint(tokenizer, config.vocab_size)
        unread = prompt_cache.rewind_to(self.cache, prompt)
        known = prompt[: len(prompt) - len(unread)]
        sampler = Sampler(config.vocab_size, self.chosen.sampling, self.chosen.args.seed)
        sampler.observe(known)
        self.statistics = Statistics(len(prompt), len(known))
        pieces = stream(
            self.model, tokenizer, unread, sampler, room, self.statistics,
            cache=self.cache, constraint=constraint,
        )  # fmt: skip
        return chat.segments(pieces, tools or None)

    def recall(self, messages: Messages, tools: Messages = ()) -> None:
        """Forget all but what `messages` begin with."""
        prompt_cache.rewind_to(self.cache, self._prompt(messages, tools) if messages else [])

    def _prompt(self, messages: Messages, tools: Messages) -> list[int]:
        return chat.render(self.chosen.tokenizer, messages, tools=tools, date=self.chosen.date)

    def status(self) -> str:
        """Speed and context in a few words."""
        speed = self.statistics.generated_tokens_per_second
        share = self.context / self.longest_context
        used = f"{self.context} of {self.longest_context} tokens ({share:.0%})"
        cut = " · cut short by --max-tokens" if self.statistics.finish_reason == "length" else ""
        return f"{speed:.1f} tokens/s · context {used}{cut}"

    def report(self) -> str:
        """The last answer's statistics in full."""
        self.statistics.peak_memory_bytes = memory.peak_bytes()
        return f"{self.statistics}\ncontext: {self.context} of {self.longest_context} tokens"
