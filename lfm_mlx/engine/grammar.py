"""Answers that follow a grammar: a Constraint by llguidance (the extra `structured`).

The mask of a step takes it some ten microseconds at a vocabulary of 128,000, a hundred where the
place in the grammar is new; `benchmarks/masks.py` measures it beside xgrammar, whose masks cost as
much but whose grammars take ten times as long to compile, and which brings PyTorch along.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.errors import InputError, one_line

try:
    import llguidance
except ImportError:
    llguidance = None


Encode = Callable[[bytes], list[int] | None]


class Vocabulary:
    """A tokenizer's tokens as llguidance reads them; many grammars share one.

    words: the bytes of each token, by id; empty for an id without a token
    special: tokens that stand for no text, which a grammar names by their ids: `<[7]>`
    stop_ids: what may end an answer that is complete
    encode: text → tokens as the model was trained on them, None where it has none. Where a grammar
        leaves one text, its tokens are the only ones allowed

    Raises InputError if llguidance is not installed, or nothing can end an answer.
    """

    def __init__(
        self, words: Sequence[bytes], special: Collection[int], stop_ids: Collection[int],
        encode: Encode | None = None,
    ):  # fmt: skip
        library = _library()
        if not stop_ids:
            raise InputError("the tokenizer has no token that ends an answer; expected eos_token")
        self.words, self.stop_ids = words, frozenset(stop_ids)
        table: Any = library.TokenizerWrapper(_Table(words, special, min(stop_ids), encode))
        self.tokenizer = library.LLTokenizer(table, eos_token=sorted(stop_ids))


def _library() -> Any:
    """llguidance. Raises InputError if it is not installed."""
    if llguidance is None:
        raise InputError(
            "answers that fit a schema or a regex need llguidance; "
            "pip install 'lfm_mlx[structured]'"
        )
    return llguidance


class _Table:
    """A tokenizer as llguidance wants it; where `encode` has no tokens, the longest match is."""

    bos_token_id = None

    def __init__(
        self, words: Sequence[bytes], special: Collection[int], eos_token_id: int,
        encode: Encode | None,
    ):  # fmt: skip
        self._encode, self._special = encode, frozenset(special)
        self.tokens, self.eos_token_id = words, eos_token_id
        self.special_token_ids = sorted(special)
        self._ids = {word: token for token, word in enumerate(words) if token not in special}
        self._longest = max(map(len, words))

    def __call__(self, text: bytes) -> list[int]:
        encoded = self._encode(text) if self._encode else None
        # A special token stands for no text, so text that spells one is not it.
        if encoded is None or not self._special.isdisjoint(encoded):
            return self._longest_matches(text)
        return encoded

    def _longest_matches(self, text: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), at + 1)
            ids += [self._ids[text[at:end]]] if text[at:end] in self._ids else []
            at = end
        return ids


class Grammar:
    """An answer that follows a grammar in llguidance's Lark, and ends only when it is complete."""

    def __init__(self, vocabulary: Vocabulary, lark: str, what: str):
        """`what` the user asked for (`regex`) begins the line of an InputError."""
        matcher = _library().LLMatcher
        self._stop_ids, self._what = vocabulary.stop_ids, what
        self._vocab_size = len(vocabulary.words)
        source = matcher.grammar_from_lark(lark)
        self._matcher = matcher(vocabulary.tokenizer, source, log_level=0)
        if not self._words().any():
            raise InputError(f"{what}: no answer fits it")

    def allowed(self) -> mx.array | None:
        bits = mx.array(self._words())[:, None] >> mx.arange(32, dtype=mx.uint32)
        return (bits & 1).astype(mx.bool_).reshape(-1)[: self._vocab_size]

    def advance(self, token: int) -> None:
        if token not in self._stop_ids:
            self._matcher.consume_token(token)
            self._check()

    def _words(self) -> np.ndarray:
        """A bit a token, [V / 32]."""
        self._check()
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return words

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"{self._what}: {_problem(self._matcher.get_error())}")


def _problem(error: str) -> str:
    """llguidance's message in one line, without its drawing of the place."""
    lines = [line for line in error.splitlines() if "|" not in line and line.strip(" ^")]
    text = re.sub(r"^at \d+\(\d+\): ", "", " ".join(lines) or error)
    return one_line(ValueError(text))[:300]
