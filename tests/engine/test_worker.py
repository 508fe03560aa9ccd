"""The worker's thread: every job that was taken ends once, whatever happens to whom."""

import threading
from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest
from caches import build
from jobs import KINDS, SAMPLINGS, alone, constrained, told

from lfm_mlx.engine.engine import Engine, Limits, Overloaded
from lfm_mlx.engine.job import Ended, Event, Job, Token
from lfm_mlx.engine.worker import Closed, Worker
from lfm_mlx.errors import InputError

MODEL = build("odd")
mx.eval(MODEL.parameters())  # on this thread, where they were made
JOBS = [Job([5, 6, number], 20, SAMPLINGS[number % 5], seed=3) for number in range(9)]


class Listener:
    """Collects events, and says when a job was told something."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.changed = threading.Condition()

    def __call__(self, events: Sequence[Event]) -> None:
        with self.changed:
            self.events += events
            self.changed.notify_all()

    def wait(self, found: Callable[[list[Event]], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: found(self.events), 30)


def started(limits: Limits = Limits(rows=4)) -> tuple[Worker, Listener]:  # noqa: B008
    listener = Listener()
    worker = Worker(lambda: Engine(MODEL, limits), listener)
    worker.start()
    assert worker.ready.wait(30)
    return worker, listener


def test_answers_come_from_many_threads() -> None:
    worker, listener = started()
    numbers: dict[int, Job] = {}
    threads = [
        threading.Thread(target=lambda job=job: numbers.__setitem__(worker.submit(job), job))
        for job in JOBS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.drain(60)
    found = told(listener.events)
    assert {n: found[n].answer for n in numbers} == {n: alone(MODEL, j) for n, j in numbers.items()}
    assert worker.failure is None


@pytest.mark.parametrize("kind", KINDS)
def test_constraints_are_made_on_another_thread(kind: str) -> None:
    worker, listener = started()
    jobs = {worker.submit(constrained(job, kind, MODEL.config.vocab_size)): job for job in JOBS[:3]}
    worker.drain(60)
    found = told(listener.events)
    for number, job in jobs.items():
        assert found[number].answer == alone(
            MODEL, constrained(job, kind, MODEL.config.vocab_size)
        ), found[number].ended


def test_a_job_is_cancelled_while_it_decodes_and_before() -> None:
    worker, listener = started(Limits(rows=1))
    running = worker.submit(Job([1, 2], 4000))
    queued = worker.submit(Job([3], 4000))
    listener.wait(lambda events: any(isinstance(event, Token) for event in events))
    worker.cancel(queued)
    worker.cancel(running)
    worker.cancel(12345)
    listener.wait(lambda events: sum(isinstance(event, Ended) for event in events) == 2)
    found = told(listener.events)
    assert found[running].answer[1] == found[queued].answer[1] == "cancelled"
    assert worker.status().running == worker.status().waiting == 0
    worker.stop()


def test_draining_lets_jobs_end_and_takes_no_more() -> None:
    worker, listener = started()
    number = worker.submit(JOBS[0])
    worker.drain(60)
    assert told(listener.events)[number].answer == alone(MODEL, JOBS[0])
    with pytest.raises(Closed, match="about to end"):
        worker.submit(JOBS[1])


def test_what_does_not_end_in_time_is_cancelled() -> None:
    worker, listener = started()
    number = worker.submit(Job([1], 4000))
    listener.wait(lambda events: any(isinstance(event, Token) for event in events))
    worker.drain(0.01)
    assert told(listener.events)[number].answer[1] == "cancelled"


def test_a_job_that_cannot_be_answered_is_refused_on_its_own_thread() -> None:
    worker, _ = started(Limits(rows=1, waiting=1))
    with pytest.raises(InputError, match="empty"):
        worker.submit(Job([]))
    long = [worker.submit(Job([1], 4000)) for _ in range(2)]
    with pytest.raises(Overloaded):
        worker.submit(Job([1]))
    for number in long:
        worker.cancel(number)
    worker.stop()


def test_a_model_that_cannot_be_built_is_a_failure() -> None:
    def build_nothing() -> Engine:
        raise InputError("no such folder")

    worker = Worker(build_nothing, lambda _: None)
    with pytest.raises(Closed, match="still being loaded"):
        worker.submit(JOBS[0])
    worker.start()
    assert worker.ready.wait(30)
    assert str(worker.failure) == "no such folder"
    worker.stop()


@pytest.mark.parametrize("failures", [1, 2])
def test_an_engine_that_fails_ends_its_jobs_and_twice_the_worker(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    worker, listener = started(Limits(rows=2))
    left = failures

    def step() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("the device is gone")

    assert worker.engine is not None
    first = worker.submit(Job([1], 4000))
    listener.wait(lambda events: any(isinstance(event, Token) for event in events))
    monkeypatch.setattr(worker.engine, "_step", step)
    listener.wait(lambda events: isinstance(events[-1], Ended))
    if failures == 1:
        monkeypatch.undo()
    second = worker.submit(JOBS[0])
    listener.wait(lambda events: events[-1].job == second and isinstance(events[-1], Ended))
    found = told(listener.events)
    assert found[first].ended.error == "RuntimeError: the device is gone"  # pyright: ignore
    if failures == 1:
        assert found[second].answer == alone(MODEL, JOBS[0])
    else:
        assert found[second].answer[1] == "error"
        with pytest.raises(Closed):
            worker.submit(JOBS[1])
    worker.stop()
    assert (worker.failure is None) == (failures == 1)
