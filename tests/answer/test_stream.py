"""Statistics of a run: counts equal events, times are in order, and the stop token is not shown."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lfm_mlx.answer import stream
from lfm_mlx.answer.stream import Statistics, measured, rate, text_of
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.engine.decode import Step
from lfm_mlx.engine.lookup import PromptLookup
from lfm_mlx.load import load_tokenizer

STEPS = [Step(5, -0.1), Step(6, -0.2), Step(7, -0.3, "length")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times that are read, one after another."""
    times = [10.0, 12.5, 13.0, 14.0]
    monkeypatch.setattr(time, "perf_counter", lambda: times.pop(0))
    return times


def test_counts_equal_events_and_times_are_those_of_the_tokens(clock: list[float]) -> None:
    statistics = Statistics(100, 40)
    seen = []
    for step in measured(STEPS, statistics):
        seen.append((step, statistics.generated_tokens, statistics.total_seconds))
    assert seen == [(STEPS[0], 1, 2.5), (STEPS[1], 2, 3.0), (STEPS[2], 3, 4.0)]
    assert statistics.time_to_first_token_seconds == 2.5
    assert clock == []
    assert statistics.finish_reason == "length"
    assert statistics.prompt_tokens_per_second == pytest.approx(60 / 2.5)
    assert statistics.generated_tokens_per_second == pytest.approx(2 / 1.5)


def test_a_run_that_was_not_ended_says_so() -> None:
    statistics = Statistics(1)
    assert next(measured(STEPS, statistics)) == STEPS[0]
    assert (statistics.finish_reason, statistics.generated_tokens) == ("interrupted", 1)
    assert 0 < statistics.time_to_first_token_seconds <= statistics.total_seconds


def test_drafts_are_counted_as_the_lookup_counts_them() -> None:
    lookup, statistics = PromptLookup(), Statistics(1)

    def steps() -> Iterator[Step]:
        for step in STEPS:
            lookup.passes, lookup.drafted, lookup.accepted = (
                lookup.passes + 1, lookup.drafted + 4, lookup.accepted + 3
            )  # fmt: skip
            yield step

    assert list(measured(steps(), statistics, lookup)) == STEPS
    found = (statistics.passes, statistics.drafted_tokens, statistics.accepted_tokens)
    assert found == (3, 12, 9)
    assert "9 of 12 drafted tokens accepted, 1.00 tokens a pass" in str(statistics)


def test_the_report_has_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.device, "peak_bytes", lambda: 2_500_000_000)
    statistics = Statistics(100, 40, 11, 2.0, 4.0, finish_reason="stop")
    assert str(statistics) == (
        "prompt: 100 tokens (40 of them reused), 30.0 tokens/s, first token after 2.00 s\n"
        "answer: 11 tokens, 5.0 tokens/s, finished: stop\n"
        "peak memory: 2.50 GB"
    )
    assert statistics.as_dict() == {
        "prompt_tokens": 100, "reused_tokens": 40, "generated_tokens": 11,
        "time_to_first_token_seconds": 2.0, "total_seconds": 4.0,
        "peak_memory_bytes": 2_500_000_000, "passes": 0, "drafted_tokens": 0,
        "accepted_tokens": 0, "finish_reason": "stop",
        "prompt_tokens_per_second": 30.0, "generated_tokens_per_second": 5.0,
    }  # fmt: skip
    assert "reused" not in str(Statistics(100))


@pytest.mark.parametrize(("count", "seconds", "expected"), [(6, 2, 3), (0, 2, 0), (6, 0, 0)])
def test_a_rate_of_nothing_is_none(count: int, seconds: float, expected: float) -> None:
    assert rate(count, seconds) == expected
    assert rate(-1, 1) == 0


def test_the_token_that_ends_a_turn_is_not_shown() -> None:
    tokenizer = load_tokenizer(DEMO_FOLDER)
    words = tokenizer.encode("An answer.", add_special_tokens=False)
    steps = [Step(token, 0.0) for token in words]
    assert "".join(text_of(tokenizer, steps)) == "An answer."
    ended = [*steps, Step(min(tokenizer.eos_token_ids), 0.0, "stop")]
    assert "".join(text_of(tokenizer, ended)) == "An answer."
    cut = [*steps[:-1], replace(steps[-1], finish_reason="length")]
    assert "".join(text_of(tokenizer, cut)) == "An answer."
