"""Decoding with drafts against decoding without: the same tokens, whatever is drafted."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from caches import CONFIGS, build, draw
from model.test_decoder import ODD

from lfm_mlx import Config, Model
from lfm_mlx.cache.cache import cached_tokens
from lfm_mlx.engine.decode import Step, decode
from lfm_mlx.engine.lookup import PromptLookup
from lfm_mlx.engine.sample import GREEDY, Sampler, Sampling
from lfm_mlx.engine.speculate import Pass, Speculation, decode_with_lookup

HOT = Sampling(0.9, 40, 0.95, 0.01, 1.1)
SAMPLINGS = {
    "greedy": GREEDY,
    "penalized": Sampling(0.0, 0, repetition_penalty=1.3),
    "everything": HOT,
    "plain": Sampling(1.0, 0, repetition_penalty=1.0),
}


class Foretold(PromptLookup):
    """Drafts a given answer, wrong at one place in `wrong_every` on average."""

    def __init__(self, prompt: list[int], answer: list[int], wrong_every: float, seed: int = 0):
        super().__init__()
        self.right = [*prompt, *answer]
        self.wrong_every = wrong_every
        self.rng = np.random.default_rng(seed)

    def should_draft(self) -> bool:
        return True

    def draft(self, token: int, most: int) -> list[int]:
        self.text.append(token)
        begin = len(self.text.tokens)
        count = int(self.rng.integers(0, min(most, 9) + 1))
        wrong = self.rng.random(count) * self.wrong_every < 1
        tokens = self.right[begin : begin + count]
        return [(token + 1) % 7 if w else token for token, w in zip(tokens, wrong, strict=False)]


@pytest.fixture(scope="module")
def model() -> Model:
    return build("odd")


def prompt_of(seed: int, length: int = 12) -> list[int]:
    return draw(seed, length).tolist()


def tokens_of(steps: Iterator[Step]) -> list[int]:
    return [step.token for step in steps]


def expect_equal(steps: list[Step], plain: list[Step]) -> None:
    assert [(s.token, s.finish_reason) for s in steps] == [
        (s.token, s.finish_reason) for s in plain
    ]
    np.testing.assert_allclose([s.logprob for s in steps], [s.logprob for s in plain], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_answers_are_those_of_decode(name: str, seed: int) -> None:
    model, prompt = build(name, 40 + seed), prompt_of(seed)
    plain = list(decode(model, prompt, max_tokens=40))
    lookup = Foretold(prompt, [step.token for step in plain], 4, seed)
    expect_equal(list(decode_with_lookup(model, prompt, lookup=lookup, max_tokens=40)), plain)
    assert 0 < lookup.accepted < lookup.drafted
    assert lookup.passes == 40 - lookup.accepted


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_same_seed_gives_the_same_answer_as_decode(model: Model, name: str, seed: int) -> None:
    def sampler() -> Sampler:
        return Sampler(ODD["vocab_size"], SAMPLINGS[name], seed)

    prompt = prompt_of(seed)
    plain = list(decode(model, prompt, sampler=sampler(), max_tokens=30))
    for wrong_every in (1.5, 6):
        lookup = Foretold(prompt, [step.token for step in plain], wrong_every, seed)
        steps = decode_with_lookup(model, prompt, lookup=lookup, sampler=sampler(), max_tokens=30)
        expect_equal(list(steps), plain)
        assert lookup.accepted > 0


def test_a_text_that_repeats_itself_takes_fewer_passes(model: Model) -> None:
    prompt = prompt_of(5)
    plain = tokens_of(decode(model, prompt, max_tokens=60))
    lookup = PromptLookup()
    lookup.text.extend([*prompt, *plain])
    assert tokens_of(decode_with_lookup(model, prompt, lookup=lookup, max_tokens=60)) == plain
    assert lookup.passes <= 20


def test_what_the_cache_has_read_is_looked_up_too(model: Model) -> None:
    prompt = prompt_of(6)
    answer = tokens_of(decode(model, prompt, max_tokens=40))
    cache = model.make_cache()
    model(mx.array([[*prompt, *answer]]), cache)
    expected = tokens_of(decode(model, prompt, max_tokens=20, cache=copy.deepcopy(cache)))
    lookup = PromptLookup()
    steps = decode_with_lookup(model, prompt, lookup=lookup, max_tokens=20, cache=cache)
    assert tokens_of(steps) == expected
    assert lookup.text.tokens == [*prompt, *answer, *prompt, *expected]


@pytest.mark.parametrize("place", range(12))
def test_a_stop_token_anywhere_ends_it(model: Model, place: int) -> None:
    prompt = prompt_of(7)
    answer = tokens_of(decode(model, prompt, max_tokens=12))
    stop = {answer[place]}
    plain, cache = model.make_cache(), model.make_cache()
    expected = list(decode(model, prompt, max_tokens=12, stop_ids=stop, cache=plain))
    lookup = Foretold(prompt, answer, 8, place)
    steps = decode_with_lookup(
        model, prompt, lookup=lookup, max_tokens=12, stop_ids=stop, cache=cache
    )
    expect_equal(list(steps), expected)
    expect_same_cache(model, cache, plain)


def expect_same_cache(model: Model, cache: list, plain: list) -> None:
    assert cached_tokens(cache) == cached_tokens(plain)
    following = mx.array([[3, 5]])
    np.testing.assert_allclose(
        np.array(model(following, cache)), np.array(model(following, plain)), atol=1e-4
    )


@pytest.mark.parametrize("max_tokens", [0, 1, 2, 3, 7, 20])
def test_no_more_than_max_tokens(model: Model, max_tokens: int) -> None:
    prompt = prompt_of(8)
    answer = tokens_of(decode(model, prompt, max_tokens=30))
    plain, cache = model.make_cache(), model.make_cache()
    expected = list(decode(model, prompt, max_tokens=max_tokens, cache=plain))
    lookup = Foretold(prompt, answer, 1e9)
    steps = decode_with_lookup(model, prompt, lookup=lookup, max_tokens=max_tokens, cache=cache)
    expect_equal(list(steps), expected)
    expect_same_cache(model, cache, plain)


@pytest.mark.parametrize("taken", range(1, 12))
def test_a_caller_who_leaves_finds_what_it_was_given_in_the_cache(model: Model, taken: int) -> None:
    prompt, cache = prompt_of(9), model.make_cache()
    answer = tokens_of(decode(model, prompt, max_tokens=30))
    lookup = Foretold(prompt, answer, 1e9, seed=2)
    steps = decode_with_lookup(model, prompt, lookup=lookup, max_tokens=30, cache=cache)
    for _ in range(taken):
        next(steps)
    steps.close()
    plain = model.make_cache()
    model(mx.array([[*prompt, *answer[:taken]]]), plain)
    expect_same_cache(model, cache, plain)


def test_a_cache_that_cannot_be_rewound_gets_no_drafts(model: Model) -> None:
    read, prompt = draw(10, 1, 9), prompt_of(11)

    def cache() -> list:
        made = model.make_cache()
        model(read, made, input_embeddings=model.model.embed_tokens(read))
        return made

    plain = tokens_of(decode(model, prompt, max_tokens=15, cache=cache()))
    lookup = Foretold(prompt, plain, 1e9)
    steps = decode_with_lookup(model, prompt, lookup=lookup, max_tokens=15, cache=cache())
    assert tokens_of(steps) == plain
    assert lookup.drafted == 0


class Misled(PromptLookup):
    """Finds matches as always, and then drafts what does not come."""

    def draft(self, token: int, most: int) -> list[int]:
        return [(token + 1) % 7 for token in super().draft(token, most)]


def test_it_stops_drafting_what_is_never_accepted(model: Model) -> None:
    prompt = prompt_of(12)
    answer = tokens_of(decode(model, prompt, max_tokens=200))
    lookup = Misled()
    lookup.text.extend([*prompt, *answer])
    assert tokens_of(decode_with_lookup(model, prompt, lookup=lookup, max_tokens=200)) == answer
    assert lookup.passes == 200
    # Needing matches of 2, 4, 8, ... tokens: as many failures as 200 has binary digits.
    assert 0 < lookup.drafted <= 2 * 8


# The distribution


class Length:
    """Keys and values that nobody reads: their length."""

    def __init__(self) -> None:
        self.offset = self.nbytes = 0
        self.state = ()

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        self.offset -= count
        return count


class Table:
    """A model whose next token depends on the last one."""

    VOCABULARY = 6
    SHAPE: ClassVar = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 100, "num_hidden_layers": 1,
        "num_dense_layers": 1, "layer_types": ["full_attention"],
    }  # fmt: skip

    def __init__(self) -> None:
        self.config = Config.from_dict(ODD | self.SHAPE)
        shape = (self.VOCABULARY, self.VOCABULARY)
        self.logits = mx.array(np.random.default_rng(3).normal(size=shape).astype(np.float32))

    def make_cache(self) -> list:
        return [Length()]

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        cache[0].offset += tokens.shape[1]
        return self.logits[tokens]


FIRST = [1, 4]
RUNS = 1200


def narrowed(logits: np.ndarray, seen: set[int], chosen: Sampling) -> np.ndarray:
    """The probabilities that `chosen` draws from, written out."""
    logits = logits.astype(np.float64, copy=True)
    for token in seen:
        factor = chosen.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    if chosen.top_k:
        logits[np.argsort(-logits)[chosen.top_k :]] = -np.inf
    weights = np.exp((logits - logits.max()) / chosen.temperature)
    return weights / weights.sum()


def exact(model: Table, chosen: Sampling, length: int) -> dict[tuple[int, ...], float]:
    """The probability of every answer of `length` tokens."""
    table = np.array(model.logits)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for answer, probability in found.items():
            tokens = [*FIRST, *answer]
            drawn_from = narrowed(table[tokens[-1]], set(tokens), chosen)
            longer |= {(*answer, t): probability * p for t, p in enumerate(drawn_from) if p > 0}
        found = longer
    return found


class Constant(PromptLookup):
    """Drafts the same tokens always."""

    def should_draft(self) -> bool:
        return True

    def draft(self, token: int, most: int) -> list[int]:
        self.text.append(token)
        return [2, 3][:most]


def chi_square(model: Table, chosen: Sampling) -> tuple[float, float]:
    """The statistic of RUNS drawn answers, and what it exceeds once in ten thousand times."""
    expected = exact(model, chosen, 4)
    drawn: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(RUNS):
        lookup, sampler = Constant(), Sampler(Table.VOCABULARY, chosen, seed)
        steps = decode_with_lookup(model, FIRST, lookup=lookup, sampler=sampler, max_tokens=4)
        drawn[tuple(tokens_of(steps))] += 1
        accepted += lookup.accepted
    assert accepted > RUNS / 20
    assert set(drawn) <= set(expected)
    return pooled_statistic(drawn, expected)


def pooled_statistic(drawn: Counter, expected: dict) -> tuple[float, float]:
    """Answers expected fewer than 8 times count as one; Wilson and Hilferty's bound."""
    cells = [(drawn[a], RUNS * p) for a, p in expected.items() if RUNS * p >= 8]
    rest = (RUNS - sum(c for c, _ in cells), RUNS - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 8 else []
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    degrees = len(cells) - 1
    assert degrees >= 8
    spread = 2 / (9 * degrees)
    return statistic, degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


DRAWN = [Sampling(1.0, 0, repetition_penalty=1.0), Sampling(0.8, 4, repetition_penalty=1.4)]


@pytest.mark.parametrize("chosen", DRAWN)
def test_answers_are_drawn_from_the_models_distribution(chosen: Sampling) -> None:
    statistic, bound = chi_square(Table(), chosen)
    assert statistic < bound


def test_accepting_too_much_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Speculation.read

    def lenient(this: Speculation, token: mx.array, draft: list[int]) -> Pass:
        """Takes the first drafted token for what was drawn, always."""
        done = read(this, token, draft)
        drafted = mx.array(draft[:1], done.tokens.dtype)
        tokens = mx.concatenate([drafted, done.tokens[len(draft[:1]) :]])
        return replace(done, tokens=tokens)

    monkeypatch.setattr(Speculation, "read", lenient)
    statistic, bound = chi_square(Table(), DRAWN[0])
    assert statistic > 2 * bound
