"""The one thread that touches MLX: an Engine of its own, asked from any thread.

    worker = Worker(lambda: Engine(load_model(folder)), deliver)
    worker.start()
    worker.ready.wait()
    number = worker.submit(Job(prompt))
    worker.cancel(number)
    worker.drain(30)

`deliver` is called on the worker's thread with all events of one turn; it must not wait. A server
on an event loop gives `lambda events: loop.call_soon_threadsafe(take, events)`. Every job that
`submit` has taken gets exactly one Ended, whatever happens to the engine. What an event holds is
plain Python: no array leaves the thread, and none that is lazy may come into it. So the model is
loaded by `build`, or evaluated before; `Job`s and their constraints can be made anywhere.

A process stops its worker before it exits: MLX aborts it otherwise.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.engine.engine import Engine, Overloaded
from lfm_mlx.engine.job import Ended, Event, Job
from lfm_mlx.errors import InputError, one_line

# Failures of the engine itself: so many within so long mean that it will not recover.
MOST_FAILURES = 2
FAILURE_SECONDS = 60.0


class Closed(InputError):
    """The worker takes no jobs: it is not ready yet, ends, or has failed."""


@dataclass(frozen=True)
class Status:
    """Numbers of one moment.

    waiting, reading, running: jobs; reading includes those that wait for a row
    paused: how often a job was put back for want of memory
    row_bytes, store_bytes, capacity_bytes: of caches
    quiet_seconds: since something was last done while there was something to do; 0 when idle
    """

    waiting: int = 0
    reading: int = 0
    running: int = 0
    paused: int = 0
    row_bytes: int = 0
    store_bytes: int = 0
    capacity_bytes: int = 0
    quiet_seconds: float = 0.0


class Worker:
    """Runs an engine on a thread.

    build: makes the engine, on the worker's thread; whatever it raises is `failure`
    deliver: is given the events of each turn
    ready: set once the engine is built, or could not be
    failure: why the worker has ended by itself; None while it has not
    """

    def __init__(
        self, build: Callable[[], Engine], deliver: Callable[[Sequence[Event]], None], *,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._build, self._deliver, self._clock = build, deliver, clock
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self.engine: Engine | None = None
        self._thread = threading.Thread(target=self._run, name="lfm_mlx worker", daemon=True)
        self._wake = threading.Condition()
        self._asked: deque[tuple[int, Job | None]] = deque()  # a number with None: cancel it
        self._numbers = itertools.count(1)
        self._open: set[int] = set()  # taken, and not told to be over
        self._draining = self._stopping = False
        self._failures: deque[float] = deque(maxlen=MOST_FAILURES)
        self._active = clock()
        self._status = Status()

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> int:
        """Take a job, from any thread; its events name it by the number that is returned.

        Raises InputError for a job that cannot be answered, Overloaded if too many wait, and Closed
        before `ready`, while draining and after a failure.
        """
        engine = self.engine
        if engine is None:
            raise Closed("the model is still being loaded; try again later")
        engine.check(job)
        with self._wake:
            if self._draining or self._stopping or self.failure is not None:
                raise Closed("no more jobs are taken: this process is about to end")
            limits, begun = engine.limits, self._status.reading + self._status.running
            if len(self._open) >= limits.waiting + max(begun, limits.rows):
                raise Overloaded(f"{limits.waiting} jobs wait already; try again later")
            number = next(self._numbers)
            if not self._open:
                self._active = self._clock()
            self._open.add(number)
            self._asked.append((number, job))
            self._wake.notify()
        return number

    def cancel(self, number: int) -> None:
        """End a job wherever it is, from any thread; it is told as any other end."""
        with self._wake:
            self._asked.append((number, None))
            self._wake.notify()

    def drain(self, seconds: float) -> None:
        """Take no more jobs, let those under way end, cancel them after `seconds`, and stop."""
        with self._wake:
            self._draining = True
            self._wake.notify()
        self._thread.join(seconds)
        self.stop()

    def stop(self) -> None:
        """End every job as cancelled, and the thread; returns when it has ended."""
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify()
        self._thread.join()

    def status(self) -> Status:
        """Numbers of the last turn, for any thread."""
        with self._wake:
            busy = bool(self._open)
            quiet = self._clock() - self._active if busy else 0.0
            return Status(**{**self._status.__dict__, "quiet_seconds": quiet})

    def _run(self) -> None:
        try:
            self.engine = self._build()
            self.ready.set()
            while self._turn(self.engine):
                pass
        except BaseException as error:
            self.failure = error
        finally:
            with self._wake:
                self._draining = True
                left, self._open = self._open, set()
            reason = "cancelled" if self.failure is None else "error"
            text = None if self.failure is None else one_line(self.failure)
            if left:
                with contextlib.suppress(Exception):  # it may be why the worker ended
                    self._deliver([Ended(number, reason, error=text) for number in sorted(left)])
            self.ready.set()
            # Else MLX aborts the process when it exits after a thread that computed.
            mx.clear_streams()

    def _turn(self, engine: Engine) -> bool:
        """Obey what was asked, and do one thing; False if it is time to end."""
        with self._wake:
            while not (self._asked or engine.busy or self._draining):
                self._wake.wait()
            asked, stopping = [*self._asked], self._stopping
            self._asked.clear()
            if self._draining and not asked and not engine.busy:
                return False
        for number, job in asked:
            if job is None:
                engine.cancel(number)
            else:
                engine.take(job, number)
        if stopping:
            for row in engine.jobs():
                engine.cancel(row.number)
        self._tell(engine, self._tick(engine))
        return True

    def _tick(self, engine: Engine) -> list[Event]:
        try:
            return engine.tick()
        except Exception as error:
            self._failures.append(self._clock())
            full = len(self._failures) == MOST_FAILURES
            if full and self._clock() - self._failures[0] < FAILURE_SECONDS:
                raise
            return engine.fail(error)

    def _tell(self, engine: Engine, events: list[Event]) -> None:
        status = Status(
            len(engine.waiting), len(engine.reading) + len(engine.ready), len(engine.rows),
            engine.paused, sum(map(engine.reserved, engine.begun())), engine.store.nbytes,
            engine.budget.capacity,
        )  # fmt: skip
        with self._wake:
            self._status = status
            self._active = self._clock()
            self._open -= {event.job for event in events if isinstance(event, Ended)}
        if events:
            self._deliver(events)
