"""Walks through a Constraint: random allowed tokens, as a model of random weights would draw."""

import random
from collections.abc import Sequence

import numpy as np

from lfm_mlx.answer.control import vocabulary_of
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.engine.constraint import Constraint
from lfm_mlx.load import load_tokenizer

TOKENIZER = load_tokenizer(DEMO_FOLDER)
# More than the tokenizer has, and no multiple of 32: a model's vocabulary may be padded.
VOCAB_SIZE = len(TOKENIZER) + 5
VOCABULARY = vocabulary_of(TOKENIZER, VOCAB_SIZE)
ADDED = TOKENIZER.get_added_vocab()
STOPS = frozenset(TOKENIZER.eos_token_ids)
CLOSING = np.array([bool(set(word) & set(b"'\"}])")) for word in VOCABULARY.words])


def allowed_tokens(constraint: Constraint) -> list[int] | None:
    mask = constraint.allowed()
    return None if mask is None else np.nonzero(np.array(mask))[0].tolist()


def walk(constraint: Constraint, seed: int, most: int = 300) -> list[int] | None:
    """The tokens of one answer without its stop; None where it has no end after `most`.

    What ends or closes something is preferred now and then, lest strings run on.
    """
    chance = random.Random(seed)
    answer: list[int] = []
    for _ in range(most):
        mask = np.array(constraint.allowed())
        assert mask.shape == (VOCAB_SIZE,), "an answer without any limit"
        assert mask.any(), "a mask that allows nothing"
        if mask[[*STOPS]].any() and chance.random() < 0.3:
            return answer
        if (mask & CLOSING).any() and chance.random() < 0.3:
            mask &= CLOSING
        tokens = np.nonzero(mask)[0]
        token = int(tokens[chance.randrange(len(tokens))])
        if token in STOPS:
            return answer
        constraint.advance(token)
        answer.append(token)
    return None


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(VOCABULARY.words[token] for token in tokens).decode()
