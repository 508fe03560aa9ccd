"""The engine: whatever comes, goes, fails and is put aside, every answer is `decode`'s own."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from caches import ODD, build, expect_same
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import KINDS, SAMPLINGS, STOP, alone, constrained, told
from make_random_checkpoint import random_tensors
from models import model_of

from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.engine import engine as engine_module
from lfm_mlx.engine.engine import Engine, Limits, Overloaded
from lfm_mlx.engine.job import Event, Job
from lfm_mlx.errors import InputError

VOCAB: int = ODD["vocab_size"]
MODEL = build("odd")
SHARED = np.random.default_rng(3).integers(0, VOCAB, 90).tolist()


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Job, str]:
    """A job and the kind of its constraint; many prompts share a beginning."""
    shared = draw(st.sampled_from([0, 0, 40, 70, 90]))
    own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
    job = Job(
        SHARED[:shared] + own,
        draw(st.integers(1, 14)),
        draw(st.sampled_from(SAMPLINGS)),
        frozenset(draw(st.sampled_from([(), (STOP,), (STOP, 30, 31, 32, 33, 34, 35)]))),
        draw(st.integers(0, 3)),
        top_logprobs=draw(st.sampled_from([0, 0, 3])),
        owner=draw(st.sampled_from(["", "", "else"])),
    )
    return job, draw(st.sampled_from(KINDS))


@st.composite
def churns(draw: st.DrawFn) -> list[tuple[str, object]]:
    """What happens to an engine, one thing after another."""
    return draw(st.lists(
        st.one_of(
            st.tuples(st.just("submit"), jobs()),
            st.tuples(st.just("tick"), st.integers(1, 6)),
            st.tuples(st.just("cancel"), st.integers(1, 8)),
            st.tuples(st.just("pause"), st.integers(0, 3)),
        ),
        min_size=8, max_size=30,
    ))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    churns(),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([None, 4]),
    st.sampled_from([None, 60_000, 600_000]),
)
def test_every_answer_is_the_one_it_gets_alone(
    churn: list[tuple[str, object]], rows: int, draft: int | None, capacity: int | None
) -> None:
    engine = Engine(MODEL, Limits(rows=rows, longest_draft=draft, capacity=capacity))
    asked: dict[int, tuple[Job, str]] = {}
    cancelled: set[int] = set()
    events: list[Event] = []
    for what, value in churn:
        if what == "submit":
            job, kind = value  # pyright: ignore[reportGeneralTypeIssues]
            asked[engine.submit(constrained(job, kind, VOCAB))] = (job, kind)
        elif what == "cancel":
            engine.cancel(value)  # pyright: ignore[reportArgumentType]
            cancelled.add(value)  # pyright: ignore[reportArgumentType]
        elif what == "pause" and engine.begun():
            begun = engine.begun()
            engine.pause(begun[value % len(begun)])  # pyright: ignore[reportOperatorIssue]
        elif what == "tick":
            for _ in range(value):  # pyright: ignore[reportArgumentType]
                events += engine.tick()
    events += engine.run()
    found = told(events)
    assert found.keys() == asked.keys()
    for number, (job, kind) in asked.items():
        tokens, reason = found[number].answer
        expected, ending = alone(MODEL, constrained(job, kind, VOCAB))
        if reason == "cancelled":
            assert number in cancelled
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, reason) == (expected, ending), found[number].ended
        for token in found[number].tokens:
            assert len(token.top) == job.top_logprobs
    for entry in engine.store.entries:
        expect_same(MODEL, entry.cache, mx.array(entry.tokens[None]), mx.array([[5]]))


def run(engine: Engine, *given: Job) -> list[tuple[list[int], str]]:
    numbers = [engine.submit(job) for job in given]
    found = told(engine.run())
    return [found[number].answer for number in numbers]


WIDE = ODD | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("draft", [None, 4])
def test_rows_have_quantized_keys_and_values(bits: int, draft: int | None) -> None:
    model = model_of(WIDE, random_tensors(WIDE, 5))
    quantization = KVQuantization.of(model.config, bits)
    engine = Engine(model, Limits(rows=3, kv_quantization=quantization, longest_draft=draft))
    given = [
        Job([*SHARED[:shared], number, 7], 9, sampling, seed=number)
        for number, (shared, sampling) in enumerate(
            zip((90, 0, 90, 60, 3), SAMPLINGS, strict=False)
        )
    ]
    expected = [alone(model, job, quantization) for job in given]
    assert run(engine, *given) == expected
    # Once more, from what is stored now: whole, moved and copied.
    numbers = [engine.submit(job) for job in given]
    found = told(engine.run())
    assert [found[number].answer for number in numbers] == expected
    assert {found[number].progress[0].prefix.tokens for number in numbers} >= {91}
    for entry in engine.store.entries:
        assert {layer.bits for layer in entry.cache if hasattr(layer, "offset")} == {bits}


class Broken:
    """A constraint that fails at one of its calls."""

    def __init__(self, calls: int):
        self.left = calls

    def allowed(self) -> None:
        self.advance(0)

    def advance(self, _: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("no such rule")


@pytest.mark.parametrize("calls", [1, 2, 3, 6])
def test_a_constraint_that_fails_ends_its_row_alone(calls: int) -> None:
    engine = Engine(MODEL, Limits(rows=4))
    good = [Job([7, 8, number], 12, SAMPLINGS[number], seed=2) for number in range(3)]
    bad = Job([7, 8, 3], 12, constraint=Broken(calls))
    numbers = [engine.submit(job) for job in [good[0], bad, *good[1:]]]
    found = told(engine.run())
    assert found[numbers[1]].answer[1] == "error"
    assert found[numbers[1]].ended.error == "RuntimeError: no such rule"  # pyright: ignore
    for number, job in zip([numbers[0], *numbers[2:]], good, strict=True):
        assert found[number].answer == alone(MODEL, job)


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_row_that_the_model_cannot_read_ends_alone(
    monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """The pass over all rows fails whenever the bad row is in it, and so does its own."""
    engine = Engine(MODEL, Limits(rows=4))
    jobs = [Job([7, 8, number], 12, SAMPLINGS[number], seed=2) for number in range(4)]
    numbers = [engine.submit(job) for job in jobs]
    events: list[Event] = []
    for _ in range(when + 2):
        events += engine.tick()
    bad = next(row for row in engine.begun() if row.number == numbers[2])
    entry = next(e for e in bad.cache if hasattr(e, "update_and_fetch"))

    def fail(*_: mx.array) -> None:
        raise RuntimeError("bad keys")

    monkeypatch.setattr(entry, "update_and_fetch", fail)
    found = told([*events, *engine.run()])
    assert found[numbers[2]].answer[1] == "error"
    for number, job in zip(numbers, jobs, strict=True):
        if number != numbers[2]:
            assert found[number].answer == alone(MODEL, job)


def test_the_youngest_is_paused_and_goes_on_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "FORESEEN_TOKENS", 8)
    engine = Engine(MODEL, Limits(rows=4))
    engine.budget = replace(engine.budget, capacity=3 * engine.budget.nbytes(60))
    jobs = [Job(SHARED[: 20 + number], 150, SAMPLINGS[number], seed=1) for number in range(3)]
    assert run(engine, *jobs) == [alone(MODEL, job) for job in jobs]
    assert engine.paused > 0
    assert engine.store.nbytes <= engine.budget.capacity


def test_what_cannot_be_answered_is_refused_at_once() -> None:
    engine = Engine(MODEL, Limits(waiting=2))
    for prompt, says in (([], "empty"), ([VOCAB], "token 211"), ([1] * 4096, "at most 4095")):
        with pytest.raises(InputError, match=says):
            engine.submit(Job(prompt))
    with pytest.raises(InputError, match="max_tokens is 0"):
        Job([1], 0)
    with pytest.raises(InputError, match="top_logprobs is 21; expected 0 to 20"):
        Job([1], top_logprobs=21)
    engine.submit(Job([1]))
    engine.submit(Job([1]))
    with pytest.raises(Overloaded, match="2 jobs wait"):
        engine.submit(Job([1]))
