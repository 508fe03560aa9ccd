"""Long prompts and answers: bounded memory, interruption, and the model's maximum."""

from typing import Any

import mlx.core as mx
import pytest
from cache.test_keys_values import NARROW
from caches import draw, expect_same
from make_random_checkpoint import random_tensors
from model.test_decoder import ODD
from models import model_of

from lfm_mlx import Model
from lfm_mlx.cache.cache import cached_tokens, stored_bytes, whole_step
from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.engine import decode
from lfm_mlx.engine.decode import prefill
from lfm_mlx.errors import InputError
from lfm_mlx.model import sdpa
from lfm_mlx.model.experts import SparseFeedForward

CHUNK = 128


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(NARROW, random_tensors(NARROW, seed=51))


def working_bytes(model: Model, length: int, packing: KVQuantization | None) -> int:
    """The most that a prefill holds beside the cache it leaves."""
    memory, tokens = model.make_cache(), draw(0, length)
    mx.eval(model.parameters(), tokens)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prefill(model, tokens, memory, decode.Reading(CHUNK, packing))
    return mx.get_peak_memory() - before - stored_bytes(memory)


@pytest.mark.parametrize("packing", [None, KVQuantization(8, 32)], ids=["float", "8 bits"])
def test_working_memory_does_not_depend_on_the_length(
    model: Model, packing: KVQuantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = 4 * 2 * CHUNK * 2048  # of one chunk against the whole long prompt: 2 MB
    monkeypatch.setattr(sdpa, "SCORES_BYTES", scores // 16)
    short, long = (working_bytes(model, length, packing) for length in (256, 2048))
    # A layer's old keys and values are there until they are copied into larger ones.
    growing = 2 * 2048 * 2 * 32 * 4
    assert long - short < growing + 2 * scores // 16
    assert long < scores


def test_an_interrupted_prefill_keeps_whole_chunks(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, memory, forward = draw(1, 300), model.make_cache(), SparseFeedForward.__call__
    calls = 0

    def interrupted(layer: SparseFeedForward, *args: Any) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == 13:  # in the middle of the third chunk
            raise KeyboardInterrupt
        return forward(layer, *args)

    monkeypatch.setattr(SparseFeedForward, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, tokens, memory, decode.Reading(64))
    monkeypatch.undo()
    assert cached_tokens(memory) == 128
    expect_same(model, memory, tokens[None, :128], draw(2, 1, 3))
    prefill(model, tokens[131:], memory, decode.Reading(64))
    whole = mx.concatenate([tokens[None, :128], draw(2, 1, 3), tokens[None, 131:]], axis=1)
    expect_same(model, memory, whole, draw(3, 1, 1))


@pytest.mark.parametrize("read", [0, 1, 5, 40])
def test_a_step_that_fails_halfway_is_undone(
    model: Model, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, memory = draw(4, 1, read), model.make_cache()
    if read:
        model(tokens, memory)
    monkeypatch.setattr(SparseFeedForward, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), whole_step(memory):
        model(draw(5, 1, 3), memory)
    monkeypatch.undo()
    expect_same(model, memory, tokens, draw(6, 1, 2))


def test_progress_can_interrupt_and_the_rest_be_read_later(model: Model) -> None:
    tokens, memory = draw(7, 200).tolist(), model.make_cache()

    def interrupt(done: int, _: int) -> None:
        if done == 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(
            decode.decode(
                model, tokens, cache=memory, reading=decode.Reading(64, progress=interrupt)
            )
        )
    rest = [step.token for step in decode.decode(model, tokens[128:], cache=memory, max_tokens=6)]
    assert rest == [step.token for step in decode.decode(model, tokens, max_tokens=6)]


@pytest.mark.parametrize("packing", [None, KVQuantization(4, 32, start=20)])
def test_large_caches_give_the_same_answer(
    model: Model, packing: KVQuantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> list[decode.Step]:
        return list(
            decode.decode(
                model,
                draw(8, 50).tolist(),
                max_tokens=20,
                reading=decode.Reading(kv_quantization=packing),
            )
        )

    small = answer()
    monkeypatch.setattr(decode, "LARGE_BYTES", 0)
    assert answer() == small


def limited(length: int) -> Model:
    config = ODD | {"max_position_embeddings": length}
    return model_of(config, random_tensors(config, seed=52))


@pytest.mark.parametrize(("prompt", "asked", "given"), [(10, 100, 22), (31, 5, 1), (10, 7, 7)])
def test_generation_ends_at_the_models_maximum(prompt: int, asked: int, given: int) -> None:
    model = limited(32)
    steps = list(decode.decode(model, draw(10, prompt).tolist(), max_tokens=asked))
    assert len(steps) == given
    assert [step.finish_reason for step in steps] == [None] * (given - 1) + ["length"]


def test_the_cache_counts_for_the_maximum() -> None:
    model, memory = limited(32), limited(32).make_cache()
    list(decode.decode(model, draw(11, 20).tolist(), max_tokens=3, cache=memory))
    assert len(list(decode.decode(model, [1, 2], max_tokens=99, cache=memory))) == 32 - 22 - 2


@pytest.mark.parametrize("length", [32, 33, 500])
def test_longer_prompts_are_refused_before_anything_is_read(length: int) -> None:
    model, memory = limited(32), limited(32).make_cache()
    with pytest.raises(InputError, match=rf"has {length} tokens; the model reads at most 31"):
        next(decode.decode(model, draw(12, length).tolist(), cache=memory))
    assert cached_tokens(memory) == 0
