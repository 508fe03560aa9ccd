"""Sequences that are decoded together, one more token each a step; each as if it were alone.

Every row has its own cache, sampler, constraint and end. The next step is handed to the device
before the tokens of the one before it are read, as in `decode`; so between two steps a row's cache
holds the prompt and every token that was told, and one more token is on its way. What goes wrong
with one row ends that row alone. A single row may draft by prompt lookup.
"""

from collections.abc import Collection, Iterator

import mlx.core as mx

from lfm_mlx.cache.cache import stored_bytes, whole_step
from lfm_mlx.cache.joined import JoinedCache
from lfm_mlx.cache.keys_values import KVQuantization, quantize_cache
from lfm_mlx.engine.decode import CLEAR_EVERY, LARGE_BYTES
from lfm_mlx.engine.lookup import PromptLookup
from lfm_mlx.engine.row import Drawing, Row, Taken, allowed, likeliest, sampler_of
from lfm_mlx.engine.sample import Draws
from lfm_mlx.engine.speculate import Speculation
from lfm_mlx.model import Model

# Tokens that enter a lone row's index a step until it has them all.
INDEXED_TOGETHER = 4096


class Rows:
    """The rows that decode.

    rows: those of the last step, in the order of the joined cache
    joining: those of the next step beside them
    """

    def __init__(
        self, model: Model, *,
        kv_quantization: KVQuantization | None = None, longest_draft: int | None = None,
    ):  # fmt: skip
        self.model, self.kv_quantization = model, kv_quantization
        self.longest_draft = longest_draft
        self.rows: list[Row] = []
        self.joining: list[Row] = []
        self._joined = JoinedCache()
        self._pending: Drawing | None = None  # of all `rows`
        # Of the rows that were drawn for last, which their samplers lack while there are several.
        self._draws: tuple[list[Row], Draws | None] = ([], None)
        self._steps = 0
        self._large = False  # keys and values, for which see decode.py

    def __len__(self) -> int:
        return len(self.rows) + len(self.joining)

    def __iter__(self) -> Iterator[Row]:
        return iter([*self.rows, *self.joining])

    def join(self, row: Row) -> None:
        """Let a row, whose prompt is read up to its last token, take part from the next step on."""
        self.model.restore(row.cache)
        self.joining.append(row)

    def leave(self, row: Row, *, take: bool = False) -> list[Taken]:
        """Take a row out; its cache holds what it has been told.

        take: tell it the token that is on its way first, which its cache will lack
        """
        if row in self.joining:
            self.joining.remove(row)
            return []
        assert self._pending is not None, "rows that have made a step have a token on its way"
        taken = self._pending.of([row]).take() if take else []
        self._part([row])
        return taken

    def _part(self, leaving: Collection[Row]) -> None:
        places = [place for place, row in enumerate(self.rows) if row in leaving]
        if not places:
            return
        self._joined.change(places)
        self._settle_draws()
        self.rows = [row for row in self.rows if row not in leaving]
        if self._pending is not None:
            self._pending = self._pending.of(self.rows)
        for row in leaving:
            row.speculation = None

    def step(self) -> list[Taken]:
        """One more token for each row: what the step before this one has drawn.

        Rows that are over afterwards have left. A draft may bring a lone row several.
        """
        before, going = self._pending, [row for row in self.rows if row.left > 1]
        leaving = [place for place, row in enumerate(self.rows) if row.left <= 1]
        joining, self.joining = self.joining, []
        tokens = [] if before is None or not going else [before.of(going).in_order()]
        tokens += [mx.array([row.tokens[-1] for row in joining])] if joining else []
        if leaving or joining:
            self._joined.change(leaving, [row.cache for row in joining])
        self.rows, self._pending = [*going, *joining], None
        if len(going) == 1 and not joining and self._drafts(going[0]):
            assert before is not None, "a row that goes on has a token on its way"
            taken = before.of([row for row in before.rows if row not in going]).take()
            try:
                taken += self._lone_step(before.of(going))
            except Exception as error:  # as with several rows, it is over and the engine goes on
                going[0].fail(error)
        elif self.rows:
            taken = self._common_step(mx.concatenate(tokens), before)
        else:
            taken = [] if before is None else before.take()
        self._part([row for row in self.rows if row.finish_reason])
        self._tidy(changed=bool(leaving or joining))
        return taken

    def _tidy(self, changed: bool) -> None:
        self._steps += 1
        if changed or self._steps % CLEAR_EVERY == 1:
            self._large = sum(stored_bytes(row.cache) for row in self.rows) > LARGE_BYTES
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()

    def _common_step(self, tokens: mx.array, before: Drawing | None) -> list[Taken]:
        """Read `tokens` [B], draw what follows them, and tell what `before` has."""
        logits = self._read(tokens)
        taken = None
        if self._large:
            mx.eval(tokens)
        if logits is not None and any(row.job.constraint for row in self.rows):
            # They make their masks while the device reads the tokens they are told.
            mx.async_eval(logits)
            taken = [] if before is None else before.take()
        if logits is not None:
            self._pending = self._draw(logits)
            mx.async_eval(self._pending.tokens, self._pending.logprobs, self._pending.tops)
        return taken if taken is not None else [] if before is None else before.take()

    def _read(self, tokens: mx.array) -> mx.array | None:
        """Logits [B, V] of the rows after `tokens` [B]; None if none is left.

        If something goes wrong each row is read alone, and those with which it goes wrong are over.
        """
        try:
            for row in self.rows:
                quantize_cache(row.cache, self.kv_quantization)
            with self._joined.whole_step():
                logits = self.model(tokens[:, None], self._joined.layers)[:, -1]
        except Exception:
            logits = self._read_alone(tokens)
        for row in self.rows:
            row.read += 1
        return logits

    def _read_alone(self, tokens: mx.array) -> mx.array | None:
        self._joined.change(range(len(self.rows)))
        found, rows = [], []
        for place, row in enumerate(self.rows):
            try:
                with whole_step(row.cache):
                    logits = self.model(tokens[place : place + 1, None], row.cache)[:, -1]
                    mx.eval(logits)
            except Exception as error:  # whatever it is, other rows go on
                row.fail(error)
            else:
                found.append(logits)
                rows.append(row)
        self._joined.change([], [row.cache for row in rows])
        self.rows = rows
        return mx.concatenate(found) if found else None

    def _draw(self, logits: mx.array) -> Drawing:
        """The next token of each row from logits [B, V]; a row whose constraint fails is over."""
        rows, draws = self._draws
        if draws is None or rows != self.rows:
            self._settle_draws()
            draws = Draws.merge([sampler_of(row).draws for row in self.rows])
            self._draws = self.rows[:], draws
        tokens, logprobs = draws(logits, [allowed(row) for row in self.rows])
        tops = {
            row: likeliest(logits[place], row.job.top_logprobs)
            for place, row in enumerate(self.rows)
            if row.job.top_logprobs
        }
        return Drawing(self.rows[:], list(range(len(self.rows))), tokens, logprobs, tops)

    def _settle_draws(self) -> None:
        """Bring every sampler up to date; of a single row it is what draws."""
        rows, draws = self._draws
        if draws is not None and len(rows) > 1:
            for place, row in enumerate(rows):
                sampler_of(row).draws = draws.extract(place)
        self._draws = [], None

    def _drafts(self, row: Row) -> bool:
        """Whether what follows is drafted; free text only, and never more than was asked."""
        free = row.job.constraint is None and not row.job.top_logprobs
        return self.longest_draft is not None and free

    def _lone_step(self, before: Drawing) -> list[Taken]:
        """`_common_step` of one row, with a draft of what follows its token read behind it."""
        self._settle_draws()
        row, token = before.rows[0], before.in_order()
        speculation = self._speculation(row)
        indexed = speculation.lookup.text.tokens
        ready = len(indexed) == len(row.tokens)
        draft, waited = speculation.draft(token, row.left) if ready else ([], False)
        done = speculation.read(token, draft)
        taken = before.take()
        if not waited:
            speculation.lookup.text.extend(row.tokens[len(indexed) :][:INDEXED_TOGETHER])
        accepted = speculation.verify(done)
        for place in range(accepted):
            drafted, logprob = done.draft[place], done.logprobs[place].item()
            row.take(drafted)
            speculation.lookup.text.append(drafted)
            taken.append(Taken(row, drafted, float(logprob)))  # pyright: ignore[reportArgumentType]
        row.read += 1 + accepted
        self._pending = Drawing([row], [accepted], done.tokens, done.logprobs)
        return taken

    def _speculation(self, row: Row) -> Speculation:
        if row.speculation is None:
            assert self.longest_draft is not None, "drafts are wanted"
            lookup = PromptLookup(self.longest_draft)
            row.speculation = Speculation(
                self.model,
                row.cache,
                sampler_of(row),
                lookup,
                row.job.stop_ids,
                self.kv_quantization,
            )
        return row.speculation
