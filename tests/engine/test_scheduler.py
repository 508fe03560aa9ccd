"""The scheduler alone, on a clock that the test moves: shares, orders and bounds."""

import itertools
from dataclasses import dataclass

import pytest

from lfm_mlx.engine.scheduler import CHUNK_STEP, LONGEST_CHUNK, Scheduler
from lfm_mlx.errors import InputError


@dataclass
class Prompt:
    unread: int
    arrived: float = 0.0


class Machine:
    """Reads so many prompt tokens a second, and takes so long for a step."""

    def __init__(self, tokens_per_second: float, step_seconds: float, share: float = 0.75):
        self.now = 0.0
        self.speed, self.step_seconds = tokens_per_second, step_seconds
        self.scheduler = Scheduler(lambda: self.now, share)
        self.step_times: list[float] = []
        self.reading_seconds = 0.0

    def run(self, rows: int, prompts: list[Prompt], seconds: float) -> None:
        """Let it work for so long; prompts that are read leave the list."""
        end = self.now + seconds
        while self.now < end:
            turn = self.scheduler.turn(rows, len(prompts))
            if turn == "idle":
                return
            if turn == "step":
                self.now += self.step_seconds
                self.step_times.append(self.now)
                self.scheduler.stepped(self.step_seconds)
                continue
            first = self.scheduler.in_order(prompts)[0]
            tokens = min(first.unread, self.scheduler.chunk_tokens(rows))
            took = tokens / self.speed
            self.now += took
            self.reading_seconds += took
            self.scheduler.read(tokens, took, rows)
            first.unread -= tokens
            if not first.unread:
                prompts.remove(first)

    def longest_gap(self) -> float:
        times = self.step_times
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("speed", [500.0, 3000.0, 9000.0])
def test_prompts_and_rows_share_the_time(share: float, speed: float) -> None:
    machine = Machine(speed, 0.01, share)
    machine.run(4, [Prompt(10_000_000)], 60)
    assert machine.reading_seconds / machine.now == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("speed", [500.0, 3000.0, 9000.0])
def test_rows_never_wait_long_for_a_prompt(speed: float) -> None:
    machine = Machine(speed, 0.01)
    machine.run(1, [], 5)
    machine.run(1, [Prompt(30_000)], 60)
    assert machine.longest_gap() <= 0.2 + 0.01 + CHUNK_STEP / speed


def test_time_without_prompts_is_not_saved_up() -> None:
    """However long rows had the device alone, a prompt that comes takes its share only."""
    fresh, old = Machine(3000, 0.01), Machine(3000, 0.01)
    old.run(1, [], 100)
    for machine in (fresh, old):
        machine.run(1, [Prompt(100_000)], 10)
    assert old.reading_seconds == pytest.approx(fresh.reading_seconds, abs=0.5)
    assert old.longest_gap() <= 0.25


def test_alone_each_gets_all() -> None:
    machine = Machine(3000, 0.01)
    machine.run(0, [Prompt(30_000)], 100)
    assert machine.now == pytest.approx(10)
    assert machine.scheduler.turn(0, 0) == "idle"
    machine.run(2, [], 1)
    assert len(machine.step_times) == pytest.approx(100, abs=1)


def test_a_short_prompt_passes_a_long_one() -> None:
    machine = Machine(3000, 0.01)
    prompts = [Prompt(60_000)]
    machine.run(1, prompts, 2)
    short = Prompt(100, machine.now)
    prompts.append(short)
    machine.run(1, prompts, 0.5)
    assert short.unread == 0
    assert len(prompts) == 1


def test_a_long_prompt_is_read_though_short_ones_never_cease() -> None:
    """Short ones take all the time there is: two for each that the machine can read."""
    machine = Machine(1000, 0.01)
    prompts = [Prompt(8000)]
    long = prompts[0]
    for _ in range(2000):
        prompts += [Prompt(400, machine.now), Prompt(400, machine.now)]
        machine.run(1, prompts, 0.5)
        if not long.unread:
            break
    assert long.unread == 0
    assert machine.now < 400


def test_of_equals_the_first_that_came_is_read_first() -> None:
    scheduler = Scheduler(lambda: 7.0)
    prompts = [Prompt(2000, 5.0), Prompt(2000, 3.0), Prompt(0, 6.0), Prompt(0, 4.0)]
    assert [prompt.arrived for prompt in scheduler.in_order(prompts)] == [4.0, 6.0, 3.0, 5.0]


def test_chunks_are_as_long_as_the_measured_speed_allows() -> None:
    scheduler = Scheduler(lambda: 0.0)
    assert scheduler.chunk_tokens(0) == LONGEST_CHUNK
    assert scheduler.chunk_tokens(1) == CHUNK_STEP
    for speed, expected in ((10.0, 64), (3300.0, 640), (1e6, LONGEST_CHUNK)):
        for _ in range(60):
            scheduler.read(1000, 1000 / speed, 1)
        assert scheduler.chunk_tokens(1) == expected
    # A few tokens say nothing about the speed of many.
    for _ in range(60):
        scheduler.read(3, 1.0, 1)
    assert scheduler.chunk_tokens(1) == LONGEST_CHUNK


@pytest.mark.parametrize("share", [0, 1, 1.5, -1])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(InputError, match="prefill_share is"):
        Scheduler(lambda: 0.0, share)
