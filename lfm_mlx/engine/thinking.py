"""The course of an answer: thinking, for so many tokens at most, and then what the answer may be.

The model opens its think block itself, or answers without one; or the prompt has opened it. Once
the budget is spent, a closing text and the closing tag are the only tokens allowed, and no other
block can be opened. With a
budget of nothing the answer begins with an empty block, which the model was not trained for: it
was trained to think, and answers worse without.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.engine.constraint import Constraint, all_but, only


@dataclass(frozen=True)
class ThinkTags:
    """The tokens of a think block.

    last_words: what ends thoughts whose budget is spent, before the closing tag
    """

    opening: int
    closing: int
    last_words: Sequence[int] = ()


class Thinking:
    """A Constraint: a think block or none, then an answer that `answer` constrains.

    tags: None if the model has none, and so never thinks
    budget: the most tokens of thought, last words and tags not counted; None for any number
    answer: None for any answer; thinking is then free to end the turn, or to be taken up again
    opened: whether the prompt ends inside a think block

    `before_answer` holds every token up to the answer, and `begun` says whether it was reached.
    """

    def __init__(
        self, tags: ThinkTags | None, stop_ids: Collection[int], vocab_size: int, *,
        budget: int | None = None, answer: Constraint | None = None, opened: bool = False,
    ):  # fmt: skip
        self._tags, self._budget, self._answer = tags, budget, answer
        self._stop_ids, self._vocab_size = frozenset(stop_ids), vocab_size
        self._thinking = opened and tags is not None
        self._forced = (
            [tags.opening, tags.closing][self._thinking :] if tags and budget == 0 else []
        )
        self._spent = bool(self._forced)
        self.thought_tokens = 0
        self.before_answer: list[int] = []
        self.begun = False

    def allowed(self) -> mx.array | None:
        if self._forced:
            return only(self._forced[:1], self._vocab_size)
        if self._thinking:
            # An answer is owed, so the turn cannot end in thoughts.
            return self._all_but(self._stop_ids) if self._answer else None
        mask = self._answer.allowed() if self._answer else None
        if self._tags is None:
            return mask
        if self._spent and mask is None:
            return self._all_but([self._tags.opening, self._tags.closing])
        may_think = not (self.begun or self._spent or self.thought_tokens)
        if mask is not None and may_think:
            return mask | only([self._tags.opening], self._vocab_size)
        return mask

    def _all_but(self, tokens: Collection[int]) -> mx.array:
        return all_but(tokens, self._vocab_size)

    def advance(self, token: int) -> None:
        forced = bool(self._forced)
        if forced:
            del self._forced[0]
        if self._thinking:
            self._think(token, forced)
        elif self._opens(token):
            self._thinking = True
        else:
            self.begun = True
            if self._answer:
                self._answer.advance(token)
        if not self.begun:
            self.before_answer.append(token)

    def _opens(self, token: int) -> bool:
        answering = self.begun and self._answer is not None
        return self._tags is not None and token == self._tags.opening and not answering

    def _think(self, token: int, forced: bool) -> None:
        assert self._tags is not None, "only a model with tags thinks"
        if token == self._tags.closing:
            self._thinking = False
            return
        self.thought_tokens += not forced
        if self._budget is not None and self.thought_tokens >= self._budget and not self._spent:
            self._forced = [*self._tags.last_words, self._tags.closing]
            self._spent = True
