"""Walks through a Constraint: random allowed tokens, as a model of random weights would draw."""

import random
from collections.abc import Collection, Sequence

import numpy as np

from lfm_mlx.constraint import Constraint
from lfm_mlx.control import vocabulary_of
from lfm_mlx.hub import DEMO_FOLDER
from lfm_mlx.load import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_FOLDER)
# More than the tokenizer has, and no multiple of 32: a model's vocabulary may be padded.
VOCAB_SIZE = len(TOKENIZER) + 5
VOCABULARY = vocabulary_of(TOKENIZER, VOCAB_SIZE)
ADDED = TOKENIZER.get_added_vocab()
STOPS = frozenset(TOKENIZER.eos_token_ids)
CLOSERS = frozenset(b"'\"}])")


def allowed_tokens(constraint: Constraint) -> list[int] | None:
    mask = constraint.allowed()
    if mask is None:
        return None
    assert mask.shape == (VOCAB_SIZE,)
    return np.nonzero(np.array(mask))[0].tolist()


def walk(
    constraint: Constraint, seed: int, most: int = 300, stops: Collection[int] = STOPS
) -> list[int] | None:
    """The tokens of one answer without its stop; None where it has no end after `most`.

    Tokens that close something are preferred now and then, lest strings run on.
    """
    chance = random.Random(seed)
    answer: list[int] = []
    for _ in range(most):
        tokens = allowed_tokens(constraint)
        assert tokens, "a mask that allows nothing, or an answer without any limit"
        closing = [token for token in tokens if set(VOCABULARY.words[token]) & CLOSERS]
        ends = [token for token in tokens if token in stops]
        if ends and (len(ends) == len(tokens) or chance.random() < 0.3):
            return answer
        if closing and chance.random() < 0.3:
            tokens = closing
        token = chance.choice(tokens)
        constraint.advance(token)
        answer.append(token)
    return None


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(VOCABULARY.words[token] for token in tokens).decode()
