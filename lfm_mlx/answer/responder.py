"""The one road from a prompt to an answer: messages or token ids → segments, on one cache.

    responder = Responder(model, tokenizer)
    for segment in responder.answer([{"role": "user", "content": "What is 27 + 58?"}]): ...

Whatever the messages are, only what differs from what was read before is read: a question further
on, a tool's result, or an earlier question edited.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from lfm_mlx import chatml
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.question import MAX_TOKENS, Messages, Question, ask, prompt_tokens
from lfm_mlx.answer.stream import Statistics, measured, text_of
from lfm_mlx.cache.cache import cached_tokens
from lfm_mlx.cache.keys_values import KVQuantization, quantize_cache
from lfm_mlx.cache.protocols import Cache
from lfm_mlx.cache.rewind import rewind_to
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.engine.choice_scores import score_choices
from lfm_mlx.engine.decode import Reading, Step, decode
from lfm_mlx.engine.lookup import PromptLookup
from lfm_mlx.engine.sample import Sampler, Sampling
from lfm_mlx.engine.speculate import decode_with_lookup
from lfm_mlx.errors import InputError
from lfm_mlx.model import Model


class Responder:
    """Answers, and remembers what it has read.

    sampling, seed: how each answer is drawn; the same seed draws the same answer
    control: what answers must be where a call says nothing else
    max_tokens: the longest answer
    date: the day the model is told, YYYY-MM-DD; today if None
    cache: what was read before; an empty one if None
    kv_quantization: of its keys and values
    longest_draft: tokens drafted for a pass by prompt lookup; None for no drafts

    statistics: of the last answer, filled while it comes
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, sampling: Sampling = Sampling(), *,  # noqa: B008
        seed: int | None = None, date: str | None = None, control: Control = Control(),  # noqa: B008
        max_tokens: int = MAX_TOKENS, cache: Cache | None = None,
        kv_quantization: KVQuantization | None = None, longest_draft: int | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.seed, self.date, self.control, self.max_tokens = seed, date, control, max_tokens
        self.cache = model.make_cache() if cache is None else cache
        self.kv_quantization, self.longest_draft = kv_quantization, longest_draft
        self.statistics = Statistics(0)

    @property
    def context(self) -> int:
        """Number of tokens in the cache."""
        return cached_tokens(self.cache)

    @property
    def longest_context(self) -> int:
        return self.model.config.max_position_embeddings

    def answer(
        self, messages: Messages, tools: Messages | None = None, tool_choice: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[chatml.Segment]:  # fmt: skip
        """The answer to `messages`, as it comes. Raises InputError at once."""
        control = replace(self.control, tools=tools, tool_choice=tool_choice)
        question = ask(
            self.tokenizer, self.model.config, messages,
            control=control, max_tokens=self.max_tokens, date=self.date,
        )  # fmt: skip
        return self.answer_question(question, progress)

    def answer_question(
        self, question: Question, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[chatml.Segment]:
        """The answer to a question, as it comes.

        progress: called with the unread prompt tokens read so far and their number

        Raises InputError at once for a cache that is quantized otherwise, and for a constraint
        where answers are drafted by prompt lookup, which drafts free text.
        """
        prompt = question.prompt
        if self.longest_draft is not None and question.constraint is not None:
            raise InputError("prompt lookup drafts free text; the answer is constrained")
        quantize_cache(self.cache, self.kv_quantization)
        unread = rewind_to(self.cache, prompt)
        known = len(prompt) - len(unread)
        sampler = Sampler(
            self.model.config.vocab_size, self.sampling, self.seed, self.model.kernels
        )
        sampler.observe(prompt[:known])
        self.statistics = Statistics(len(prompt), known)
        steps = self._steps(
            question,
            unread,
            sampler,
            Reading(progress=progress, kv_quantization=self.kv_quantization),
        )
        text = text_of(self.tokenizer, steps)
        segments = chatml.segments(text, question.control.tools, question.thinking)
        if question.control.choices and self.sampling.temperature == 0:
            return self._likeliest(question, segments)
        return segments

    def _likeliest(
        self, question: Question, segments: Iterator[chatml.Segment]
    ) -> Iterator[chatml.Segment]:
        """The thoughts, and then the likeliest of the choices.

        The likeliest token first need not lead to it: other choices may share their beginning.
        """
        drawn: list[chatml.Segment] = []
        for segment in segments:
            if segment.kind == chatml.THINKING:
                yield segment
            else:
                drawn.append(segment)
        if self.statistics.finish_reason != "stop":
            yield from drawn
            return
        scores = self.score_choices(question)
        _, choice = max(zip(scores, question.control.choices, strict=True))
        yield chatml.Segment(chatml.TEXT, choice, True)

    def _steps(
        self, question: Question, unread: list[int], sampler: Sampler, reading: Reading
    ) -> Iterator[Step]:
        options: dict[str, Any] = {
            "cache": self.cache, "sampler": sampler, "max_tokens": question.max_tokens,
            "stop_ids": self.tokenizer.eos_token_ids, "reading": reading,
        }  # fmt: skip
        lookup = None if self.longest_draft is None else PromptLookup(self.longest_draft)
        if lookup is None:
            steps = decode(self.model, unread, constraint=question.constraint, **options)
        else:
            steps = decode_with_lookup(self.model, unread, lookup=lookup, **options)
        return measured(steps, self.statistics, lookup)

    def score_choices(self, question: Question) -> list[float]:
        """Probability of each of the control's choices after the thoughts of the last answer.

        They sum to 1; none before an answer began.
        """
        constraint = question.constraint
        if constraint is None or not constraint.begun:
            return []
        before = [*question.prompt, *constraint.before_answer]
        choices = question.control.choice_tokens(self.tokenizer)
        return score_choices(self.model, self.cache, before, choices, self.tokenizer.eos_token_ids)

    def recall(self, messages: Messages, tools: Messages | None = None) -> None:
        """Forget all but what `messages` begin with."""
        control = replace(self.control, tools=tools, tool_choice="auto")
        prompt = prompt_tokens(self.tokenizer, messages, control, self.date) if messages else []
        rewind_to(self.cache, prompt)
