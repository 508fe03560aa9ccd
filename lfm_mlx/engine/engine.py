"""One engine for every job: prompts are read, rows decode together, and what was read is kept.

    engine = Engine(model)
    engine.submit(Job(prompt, max_tokens=64))
    for event in engine.run(): ...

Each answer has the tokens that `decode` gives alone with the same sampling, seed and constraint,
as far as rounding does not depend on how many rows a pass reads. A job waits, is read, decodes and
ends; short of memory, the youngest goes back to waiting, and later goes on where it was. It belongs
to one thread; `Worker` runs it on one of its own.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from lfm_mlx.cache.cache import cache_state
from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.engine.budget import FORESEEN_TOKENS, Budget
from lfm_mlx.engine.decode import check_prompt, room_for_answer
from lfm_mlx.engine.job import Ended, Event, Job, Progress, Token
from lfm_mlx.engine.prefill import Part, read_parts, read_together
from lfm_mlx.engine.row import Row
from lfm_mlx.engine.rows import Rows
from lfm_mlx.engine.sample import Sampler
from lfm_mlx.engine.scheduler import Scheduler
from lfm_mlx.engine.store import Source, Store, moves
from lfm_mlx.errors import InputError
from lfm_mlx.model import Model

# Prompts that are read while every row is taken, so that one which ends is followed at once.
READ_AHEAD = 2


class Overloaded(InputError):
    """More jobs wait than may; the same job may be taken later."""


@dataclass(frozen=True)
class Limits:
    """Limits of an engine.

    rows: decoded together; kernels serve up to 8 at a time
    waiting: jobs that may wait
    prefill_share: of the time while rows decode and prompts wait
    longest_draft: tokens drafted for a pass of a lone row by prompt lookup; None for no drafts
    capacity: bytes for caches; None for what the device leaves
    """

    rows: int = 8
    waiting: int = 256
    prefill_share: float = 0.75
    longest_draft: int | None = None
    kv_quantization: KVQuantization | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "waiting"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")


class Engine:
    """Jobs under way, in the order of their lives: waiting, reading, ready, rows.

    paused: how often a job went back to waiting
    """

    def __init__(
        self, model: Model, limits: Limits = Limits(), *,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.model, self.limits, self.clock = model, limits, clock
        quantization = limits.kv_quantization
        if limits.capacity is None:
            self.budget = Budget.of(model, quantization)
        else:
            itemsize = model.model.embedding_norm.weight.dtype.size
            self.budget = Budget(model.config, limits.capacity, itemsize, quantization)
        self.scheduler = Scheduler(clock, limits.prefill_share)
        self.store = Store(model.config)
        self.rows = self._no_rows()
        self.waiting: list[Row] = []
        self.reading: list[Row] = []
        self.ready: list[Row] = []
        self.paused = 0
        self._numbers = itertools.count(1)
        self._events: list[Event] = []

    def _no_rows(self) -> Rows:
        return Rows(
            self.model, kv_quantization=self.limits.kv_quantization,
            longest_draft=self.limits.longest_draft,
        )  # fmt: skip

    def check(self, job: Job) -> int:
        """The longest answer that the job may have. Reads nothing that changes: for any thread.

        Raises InputError for a prompt that cannot be answered, and says why.
        """
        check_prompt(job.prompt, self.model.config.vocab_size)
        room = room_for_answer(self.model.config, len(job.prompt), job.max_tokens)
        return self.budget.answer_tokens(len(job.prompt), room)

    def submit(self, job: Job) -> int:
        """Take a job; returns the number by which events name it.

        Raises InputError as `check` does, and Overloaded if too many wait.
        """
        self.check(job)
        if len(self.waiting) >= self.limits.waiting:
            raise Overloaded(f"{len(self.waiting)} jobs wait already; try again later")
        number = next(self._numbers)
        self.take(job, number)
        return number

    def take(self, job: Job, number: int) -> None:
        """Take a job that was checked, however many wait."""
        self.waiting.append(Row(number, job, self.check(job), self.clock()))

    def cancel(self, number: int) -> None:
        """End a job wherever it is, and keep what was read. One that is over is left alone."""
        row = next((row for row in self.jobs() if row.number == number), None)
        if row is None:
            return
        if row in self.rows:
            self.rows.leave(row)
        for line in (self.waiting, self.reading, self.ready):
            if row in line:
                line.remove(row)
        row.finish_reason = "cancelled"
        self._end(row)

    def jobs(self) -> list[Row]:
        """Every job that is not over."""
        return [*self.waiting, *self.begun()]

    def begun(self) -> list[Row]:
        """Those that have a cache."""
        return [*self.reading, *self.ready, *self.rows]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do or to tell."""
        return bool(self.jobs() or self._events)

    def run(self) -> Iterator[Event]:
        """Everything until all jobs are over, those with them that are submitted meanwhile."""
        while self.busy:
            yield from self.tick()

    def tick(self) -> list[Event]:
        """Do one thing, a step of all rows or a part of a prompt; returns what is to be told."""
        self._begin_waiting()
        turn = self.scheduler.turn(len(self.rows), len(self.reading))
        began = self.clock()
        if turn == "chunk":
            tokens = self._read()
            self.scheduler.read(tokens, self.clock() - began, len(self.rows))
        elif turn == "step":
            self._step()
            self.scheduler.stepped(self.clock() - began)
        self._join_ready()
        events, self._events = self._events, []
        return events

    def fail(self, error: BaseException) -> list[Event]:
        """End every job that was begun, after an error that may have touched them all.

        Those that wait go on; what is stored stays.
        """
        rows, self.reading, self.ready = self.begun(), [], []
        self.rows = self._no_rows()
        for row in rows:
            row.fail(error)
            self._end(row)
        events, self._events = self._events, []
        return events

    def _begin_waiting(self) -> None:
        for row in self.scheduler.in_order(self.waiting):
            begun = self.begun()
            held = sum(map(self.reserved, begun))
            full = len(begun) >= self.limits.rows + READ_AHEAD
            if full or (begun and held + self.reserved(row) > self.budget.capacity):
                return
            self.waiting.remove(row)
            try:
                self._begin(row, self.budget.capacity - held - self.reserved(row))
            except Exception as error:  # whatever is wrong with it, others go on
                row.fail(error)
                self._end(row)

    def reserved(self, row: Row) -> int:
        """Bytes that a job is to have: what it takes, and some of the answer in advance."""
        return self.budget.nbytes(len(row.tokens) + min(row.left, FORESEEN_TOKENS))

    def _begin(self, row: Row, left: int) -> None:
        """Give a row its cache; `left`: bytes that remain for the store then."""
        at_work = [Source(r.known(), r.cache, r.job.owner) for r in self.begun()]
        source, row.prefix = self.store.find(row.tokens, row.job.owner, at_work)
        stored = None if source is None else source.entry
        moved = source is not None and moves(source, row.prefix)
        self.store.evict(left + (stored.nbytes if stored and moved else 0), spared=stored)
        if source is None:
            row.cache = self.model.make_cache()
        elif stored is None or moved or self.store.nbytes <= left:
            row.cache = self.store.use(source, row.prefix)
        else:
            row.cache = self.store.take(source, row.prefix)
        row.read = row.prefix.tokens
        if row.sampler is None:
            row.sampler = Sampler(
                self.model.config.vocab_size, row.job.sampling, row.job.seed, self.model.kernels
            )
            row.sampler.observe(row.tokens)
        self._tell_progress(row)
        (self.reading if row.unread else self.ready).append(row)

    def _tell_progress(self, row: Row) -> None:
        # The last token is read by the step that draws the first one of the answer.
        self._events.append(Progress(row.number, row.read, len(row.tokens), row.prefix))

    def _read(self) -> int:
        """Read a part of the prompts whose turn it is; returns how many tokens."""
        most = self.scheduler.chunk_tokens(len(self.rows))
        order = self.scheduler.in_order(self.reading)
        if order[0].unread <= most:
            whole = [row for row in order if row.unread <= most]
            order = whole[: read_together([row.unread for row in whole], most)]
        else:
            order = order[:1]
        parts = [Part(r.cache, r.tokens[r.read : r.read + min(r.unread, most)]) for r in order]
        self._read_parts(order, parts)
        for row in order:
            if row.finish_reason:
                self.reading.remove(row)
                self._end(row)
                continue
            self._tell_progress(row)
            if not row.unread:
                self.reading.remove(row)
                self.ready.append(row)
        return sum(len(part.tokens) for part in parts)

    def _read_parts(self, rows: list[Row], parts: list[Part]) -> None:
        """Read in one pass; if that fails in one each, and a row whose pass fails is over."""
        try:
            read_parts(self.model, parts, self.limits.kv_quantization)
        except Exception as error:
            if len(rows) == 1:
                rows[0].fail(error)
                return
            for row, part in zip(rows, parts, strict=True):
                self._read_parts([row], [part])
            return
        for row, part in zip(rows, parts, strict=True):
            row.read += len(part.tokens)

    def _step(self) -> None:
        running = [*self.rows]
        for taken in self.rows.step():
            self._events.append(Token(taken.row.number, taken.token, taken.logprob, taken.top))
        for row in running:
            if row.finish_reason:
                self._end(row)
        self._keep_within_memory()

    def _join_ready(self) -> None:
        while self.ready and len(self.rows) < self.limits.rows:
            self.rows.join(self.ready.pop(0))

    def _keep_within_memory(self) -> None:
        """Evict what is stored, then pause the youngest jobs, until the others can grow."""
        while True:
            begun = self.begun()
            held = sum(self.budget.nbytes(len(row.tokens) + 1) for row in begun)
            if held + self.store.nbytes > self.budget.capacity:
                self.store.evict(max(0, self.budget.capacity - held))
            if held <= self.budget.capacity or len(begun) == 1:
                return
            self.pause(max(begun, key=lambda row: (row.arrived, row.number)))

    def pause(self, row: Row) -> None:
        """Let a job that was begun wait again; its cache is stored, and may be evicted."""
        if row in self.rows:
            for taken in self.rows.leave(row, take=True):
                self._events.append(Token(row.number, taken.token, taken.logprob, taken.top))
        for line in (self.reading, self.ready):
            if row in line:
                line.remove(row)
        if row.finish_reason:
            self._end(row)
            return
        self._keep(row)
        row.cache, row.read = [], 0
        self.paused += 1
        self.waiting.append(row)

    def _end(self, row: Row) -> None:
        assert row.finish_reason is not None, "it is over"
        if row.finish_reason != "error" and row.job.keep:
            self._keep(row)
        row.cache = []
        self._events.append(Ended(
            row.number, row.finish_reason, len(row.job.prompt), row.generated, row.prefix, row.error
        ))  # fmt: skip

    def _keep(self, row: Row) -> None:
        if row.read:
            mx.eval(cache_state(row.cache))
            self.store.put(row.tokens[: row.read], row.cache, row.job.owner)
