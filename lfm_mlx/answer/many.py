"""Many questions, answered together on one engine: each as `Responder` would answer it alone.

for answered in answer_many(model, tokenizer, questions, sampling): ...
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lfm_mlx import chatml
from lfm_mlx.answer.question import Question
from lfm_mlx.answer.stream import text_of
from lfm_mlx.chatml.tokenizer import Tokenizer
from lfm_mlx.engine.decode import Step
from lfm_mlx.engine.engine import Engine, Limits
from lfm_mlx.engine.job import Ended, Job, Token
from lfm_mlx.engine.sample import Sampling
from lfm_mlx.errors import InputError, one_line
from lfm_mlx.model import Model


@dataclass(frozen=True)
class Answered:
    """One of many questions with its whole answer; `key` is whatever the caller knows it by.

    finish_reason: `stop`, `length` or `error`
    error: one line, if that is the reason
    """

    key: Any
    segments: list[chatml.Segment]
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    error: str | None = None


@dataclass
class _Coming:
    """A question under way, and the tokens of its answer so far."""

    key: Any
    question: Question
    tokens: list[Token] = field(default_factory=list)


def answer_many(
    model: Model, tokenizer: Tokenizer, questions: Iterable[tuple[Any, Question]],
    sampling: Sampling, *, seed: int | None = None, size: int = 8,
) -> Iterator[Answered]:  # fmt: skip
    """Answers to many questions, in whatever order they end; a failure ends its question alone.

    questions: with their keys; taken as they are needed
    seed: of each answer's draws, as of a run of its own
    size: questions answered together
    """
    engine = Engine(model, Limits(rows=size))
    stop_ids = frozenset(tokenizer.eos_token_ids)
    waiting = iter(questions)
    under_way: dict[int, _Coming] = {}
    while True:
        # Twice the size, so that an answer that ends is followed at once by one that is read.
        for key, question in islice(waiting, 2 * size - len(under_way)):
            job = Job(
                question.prompt, question.max_tokens, sampling, stop_ids, seed, question.constraint
            )
            try:
                under_way[engine.submit(job)] = _Coming(key, question)
            except InputError as error:
                yield Answered(key, [], "error", len(question.prompt), 0, one_line(error))
        if not under_way:
            return
        for event in engine.tick():
            if isinstance(event, Token):
                under_way[event.job].tokens.append(event)
            elif isinstance(event, Ended):
                yield _read(tokenizer, under_way.pop(event.job), event)


def _read(tokenizer: Tokenizer, coming: _Coming, ended: Ended) -> Answered:
    """The answer, or the error if its text cannot be read."""
    try:
        return _answered(tokenizer, coming, ended)
    except Exception as error:  # a fault in one answer is not the end of the others
        tokens = ended.prompt_tokens, ended.generated_tokens
        return Answered(
            coming.key, [], "error", *tokens, f"{type(error).__name__}: {one_line(error)}"
        )


def _answered(tokenizer: Tokenizer, coming: _Coming, ended: Ended) -> Answered:
    reasons: list[str | None] = [None] * len(coming.tokens)
    if reasons and ended.error is None:
        reasons[-1] = ended.finish_reason
    steps = (
        Step(token.token, token.logprob, reason)
        for token, reason in zip(coming.tokens, reasons, strict=True)
    )
    asked = coming.question
    segments = list(chatml.segments(text_of(tokenizer, steps), asked.control.tools, asked.thinking))
    return Answered(
        coming.key, segments, ended.finish_reason, ended.prompt_tokens, ended.generated_tokens,
        ended.error,
    )  # fmt: skip
