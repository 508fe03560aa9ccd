"""A rewound cache against a fresh prefill of the same tokens: windows, logits, and what follows."""

import copy
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from caches import CONFIGS, EXACT, build, draw, expect_same, fresh
from make_random_checkpoint import random_tensors
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache
from model.test_decoder import ODD
from models import model_of
from reference import relative_error

from lfm_mlx import Model
from lfm_mlx.cache.cache import token_log
from lfm_mlx.cache.rewind import restore_windows, rewind
from lfm_mlx.engine.decode import decode
from lfm_mlx.engine.speculate import decode_with_lookup
from lfm_mlx.errors import InputError

LENGTH = 300


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


@pytest.mark.parametrize("name", ["24 layers of LFM2.5", "odd"])
def test_every_length_of_a_long_sequence(name: str) -> None:
    model, tokens = build(name), draw(0, 1, LENGTH)
    whole, following = fresh(model, tokens), draw(1, 1, 1)
    for length in range(LENGTH):
        cache = copy.deepcopy(whole)
        rewind(cache, length)
        expect_same(model, cache, tokens[:, :length], following)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 40, 118, 119])
def test_rewind_in_every_shape_of_model(model: Model, length: int) -> None:
    tokens = draw(2, 1, 120)
    cache = fresh(model, tokens)
    rewind(cache, length)
    expect_same(model, cache, tokens[:, :length], draw(3, 1, 4))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewind_continue_and_rewind_again(model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache, tokens = model.make_cache(), draw(seed, 1, 0)
    for step in range(12):
        for length in rng.integers(1, 30, 2):
            more = draw(100 * seed + step, 1, int(length))
            model(more, cache)
            tokens = mx.concatenate([tokens, more], axis=1)
        keep = int(rng.integers(0, tokens.shape[1] + 1))
        rewind(cache, keep)
        tokens = tokens[:, :keep]
    expect_same(model, cache, tokens, draw(9, 1, 3))


def test_rewinding_twice_without_reading_between(model: Model) -> None:
    tokens = draw(4, 1, 90)
    cache = fresh(model, tokens)
    rewind(cache, 70)
    rewind(cache, 33)
    expect_same(model, cache, tokens[:, :33], draw(5, 1, 2))


def test_fewer_replayed_tokens_would_not_do() -> None:
    model, tokens, following = build("24 layers of LFM2.5"), draw(6, 1, 200), draw(7, 1, 1)
    wanted = np.array(model(following, fresh(model, tokens[:, :150])))
    errors = {}
    assert model.config.conv_memory == 36
    for replayed in (36, 24, 16):
        cache = fresh(model, tokens)
        rewind(cache, 150)
        restore_windows(cache, replayed, model._replay)
        errors[replayed] = relative_error(np.array(model(following, cache)), wanted)
    assert errors[36] <= EXACT
    assert errors[24] > 10 * max(errors[36], 1e-8)
    assert errors[16] > 10 * errors[24]


class Counted:
    """Counts the tokens that the decoder reads."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch):
        self.tokens = 0
        replay = type(model)._replay

        def counted(this: Model, tokens: mx.array, cache: list) -> mx.array:
            self.tokens += tokens.shape[1]
            return replay(this, tokens, cache)

        monkeypatch.setattr(type(model), "_replay", counted)


@pytest.mark.parametrize("back", [1, 2, 7, 30])
def test_undoing_a_part_of_the_last_prefill_replays_nothing(
    back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = build("odd"), draw(8, 1, 120)
    cache, counted = fresh(model, tokens), Counted(model, monkeypatch)
    rewind(cache, 120 - back)
    expect_same(model, cache, tokens[:, : 120 - back], draw(9, 1, 2))
    assert counted.tokens == 0


@pytest.mark.parametrize("step", [1, 5])
def test_undoing_the_last_step_replays_nothing(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("odd"), draw(10, 1, 60)
    cache, counted = fresh(model, tokens), Counted(model, monkeypatch)
    model(draw(11, 1, step), cache)
    rewind(cache, 60)
    expect_same(model, cache, tokens, draw(12, 1, 2))
    assert counted.tokens == 0


@pytest.mark.parametrize("length", [300, 1500])
def test_the_cost_does_not_depend_on_the_length(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("odd")
    cache, counted = fresh(model, draw(13, 1, length)), Counted(model, monkeypatch)
    rewind(cache, length - 50)
    model(draw(14, 1, 1), cache)
    assert counted.tokens == model.config.conv_memory == 10


@pytest.mark.parametrize("padded", ["left", "right"])
@pytest.mark.parametrize("back", [1, 3, 20, 45])
def test_batches_are_rewound_row_by_row(padded: str, back: int) -> None:
    model, lengths, more = build("odd"), [50, 7, 31], draw(15, 3, 45)
    rows = [draw(16 + row, 1, length) for row, length in enumerate(lengths)]
    cache = read_batch(model, rows, padded)
    for column in range(more.shape[1]):
        model(more[:, column : column + 1], cache)
    assert can_trim_prompt_cache(cache)
    assert trim_prompt_cache(cache, back) == back
    following = draw(20, 3, 2)
    logits = np.array(model(following, cache))
    for row, tokens in enumerate(rows):
        kept = mx.concatenate([tokens, more[row : row + 1, : 45 - back]], axis=1)
        alone = np.array(model(following[row : row + 1], fresh(model, kept)))
        assert relative_error(logits[row], alone[0]) <= EXACT


def read_batch(model: Model, rows: list[mx.array], padded: str) -> list:
    lengths = [row.shape[1] for row in rows]
    padding = [max(lengths) - length for length in lengths]
    side = {"left": lambda n: (n, 0), "right": lambda n: (0, n)}[padded]
    tokens = mx.concatenate(
        [mx.pad(row, [(0, 0), side(pad)]) for row, pad in zip(rows, padding, strict=True)]
    )
    cache = model.make_cache(padding if padded == "left" else [0] * len(rows))
    if padded == "right":
        for entry in cache:
            entry.prepare(lengths=lengths, right_padding=padding)
    model(tokens, cache)
    if padded == "right":
        for entry in cache:
            entry.finalize()
    return cache


def test_rewound_caches_merge_and_come_apart() -> None:
    model, tokens = build("odd"), [draw(21, 1, 80), draw(22, 1, 45), draw(23, 1, 60)]
    caches = [fresh(model, row) for row in tokens]
    rewind(caches[0], 30)
    rewind(caches[2], 59)
    batch = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
    kept = [tokens[0][:, :30], tokens[1], tokens[2][:, :59]]
    following = draw(24, 3, 1)
    logits = np.array(model(following, batch))
    for row in range(3):
        alone = np.array(model(following[row : row + 1], fresh(model, kept[row])))
        assert relative_error(logits[row], alone[0]) <= EXACT
        single = [entry.extract(row) for entry in batch]
        rewind(single, 20)
        expect_same(model, single, kept[row][:, :20], draw(25, 1, 2))


def test_a_prefix_is_reused_at_any_position() -> None:
    model, store = build("odd"), LRUPromptCache()
    tokens = draw(26, 90).tolist()
    store.insert_cache("model", tokens, fresh(model, mx.array([tokens])))
    edited = tokens[:61] + draw(27, 20).tolist()
    cache, rest = store.fetch_nearest_cache("model", edited)
    assert rest == edited[61:]
    assert cache is not None
    expect_same(model, cache, mx.array([edited[:61]]), mx.array([rest]))
    again, _ = store.fetch_nearest_cache("model", tokens)
    assert again is not None
    expect_same(model, again, mx.array([tokens]), draw(28, 1, 1))


@pytest.mark.parametrize(("length", "says"), [(91, "holds 90"), (-1, "cannot rewind to -1")])
def test_impossible_lengths_leave_the_cache_as_it_was(length: int, says: str) -> None:
    model, tokens = build("odd"), draw(29, 1, 90)
    cache = fresh(model, tokens)
    with pytest.raises(InputError, match=says):
        rewind(cache, length)
    expect_same(model, cache, tokens, draw(30, 1, 1))


@pytest.mark.parametrize("config", ["odd", "attention first"])
def test_trimming_by_less_than_nothing_leaves_the_cache_as_it_was(config: str) -> None:
    model, tokens = build(config), draw(33, 1, 90)
    cache = fresh(model, tokens)
    with pytest.raises(InputError, match="cannot go back by -2 tokens"):
        trim_prompt_cache(cache, -2)
    expect_same(model, cache, tokens, draw(34, 1, 1))


WIDER = {
    "a layer more": {"num_hidden_layers": 8, "layer_types": [*ODD["layer_types"], "conv"]},
    "other kinds": {"layer_types": ODD["layer_types"][::-1]},
    "a wider window": {"conv_L_cache": 4},
    "a wider model": {"hidden_size": 2 * ODD["hidden_size"]},
    "more heads": {"num_key_value_heads": 5},
}


@pytest.mark.parametrize("decoder", [decode, decode_with_lookup])
@pytest.mark.parametrize("difference", WIDER)
def test_the_cache_of_another_model_is_refused_and_left_as_it_was(
    difference: str, decoder: Callable
) -> None:
    config, tokens = ODD | WIDER[difference], draw(35, 1, 40)
    other = model_of(config, random_tensors(config, 36))
    cache = fresh(other, tokens)
    with pytest.raises(InputError, match="belongs to another model"):
        list(decoder(build("odd"), [1, 2, 3], cache=cache))
    expect_same(other, cache, tokens, draw(37, 1, 2))


def test_what_was_read_as_embeddings_cannot_be_rewound() -> None:
    model, tokens = build("odd"), draw(31, 1, 20)
    cache = model.make_cache()
    model(tokens, cache, input_embeddings=model.model.embed_tokens(tokens))
    assert not can_trim_prompt_cache(cache)
    with pytest.raises(InputError, match="does not know the ids"):
        rewind(cache, 5)


def test_decoding_a_long_answer_keeps_every_token() -> None:
    model, cache = build("odd"), build("odd").make_cache()
    tokens = draw(32, 1, 700)
    for column in range(700):
        model(tokens[:, column : column + 1], cache)
    log = token_log(cache)
    assert log is not None
    assert len(log.parts) < log.JOINED_FROM
    np.testing.assert_array_equal(np.array(log.tokens), np.array(tokens))
