"""Drawing against its definition in NumPy, and the kernel against both."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import twins
from models import as_numpy

from lfm_mlx.kernels import metal
from lfm_mlx.kernels import sample as room
from lfm_mlx.kernels.sample import RowSampling, Seen, sample, uniform

# How near a draw's number may be to where one token ends and another begins, to be either.
NEAR = 2e-5
RECOMMENDED = RowSampling(0.2, top_k=80, repetition_penalty=1.05)


class Case(NamedTuple):
    """Logits [B, V], and for each row its settings, number, counts, last token, bias and mask."""

    logits: np.ndarray
    rows: list[RowSampling]
    numbers: list[float]
    counts: np.ndarray | None = None
    last: np.ndarray | None = None
    bias: np.ndarray | None = None
    allowed: np.ndarray | None = None

    def arrays(self, dtype: mx.Dtype) -> tuple:
        seen = None
        if self.counts is not None:
            seen = Seen(mx.array(self.counts.astype(np.uint16)), mx.array(self.last))
        bias, allowed = (None if a is None else mx.array(a) for a in (self.bias, self.allowed))
        logits = mx.array(self.logits.astype(np.float32)).astype(dtype)
        return logits, self.rows, self.numbers, seen, bias, allowed

    def alone(self, row: int) -> "Case":
        one = slice(row, row + 1)
        return Case(*(None if part is None else part[one] for part in self))

    def rounded(self, dtype: mx.Dtype) -> "Case":
        return self._replace(logits=twins.rounded(self.logits, dtype))


def kept(case: Case, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A row's weights [V], and which of its tokens may be drawn, by the definition."""
    row = case.rows[index]
    w = case.logits[index].astype(np.float64)
    if case.counts is not None:
        count = case.counts[index].astype(int)
        if case.last[index] >= 0:
            count[case.last[index]] = (count[case.last[index]] | 1) + 2
        penalty = np.float64(np.float32(row.repetition_penalty))
        w = np.where(count & 1, np.where(w > 0, w / penalty, w * penalty), w)
        times = count >> 1
        w = w - np.where(times > 0, row.presence_penalty + row.frequency_penalty * times, 0)
    if case.bias is not None:
        w = w + case.bias[index]
    if case.allowed is not None:
        w = np.where(case.allowed[index], w, -np.inf)
    w = np.where(np.isnan(w), -np.inf, w).astype(np.float32).astype(np.float64)
    order = np.argsort(-w, kind="stable")
    shares = np.exp(w[order] - w.max())
    ahead = (np.cumsum(shares) - shares) / shares.sum()
    stays = ahead < row.top_p if row.top_p < 1 else np.ones(w.size, bool)
    stays[row.top_k or w.size :] = False
    if row.min_p:
        stays &= shares >= row.min_p * (1 - 1e-6)
    found = np.zeros(w.size, bool)
    found[order[stays]] = True
    return w, found


def expect_drawn(case: Case, tokens: mx.array, logprobs: mx.array) -> None:
    """Every row's token is the definition's, or its neighbour where the number is at the border."""
    for index, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        row, (w, may) = case.rows[index], kept(case, index)
        if row.temperature == 0:
            assert token == w.argmax(), row
        else:
            shares = np.where(may, np.exp((w - w.max()) / row.temperature), 0)
            ends = np.cumsum(shares) / shares.sum()
            begins = ends[token] - shares[token] / shares.sum()
            number = case.numbers[index]
            assert may[token], f"{token} is not among {may.sum()} kept: {row}"
            assert begins - NEAR <= number <= ends[token] + NEAR, (row, begins, number)
        raw = case.logits[index].astype(np.float64)
        raw = np.where(np.isnan(raw), -np.inf, raw)
        exact = raw[token] - raw.max() - np.log(np.exp(raw - raw.max()).sum())
        np.testing.assert_allclose(logprob, exact, atol=2e-5, rtol=1e-5)


def draw(seed: int, rows: int, vocab: int, kind: str, full: bool = True) -> Case:
    """Settings of every kind; `full`: with counts, bias and mask."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, vocab)) * 3
    if kind == "peaked":
        x[:, rng.integers(0, vocab, 3)] += 25
    if kind == "ties":
        x = np.round(x)
    if kind == "flat":
        x *= 0.01
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    settings = [
        RowSampling(
            *(pick(0.0, 0.2, 1.0, 2.0), pick(0, 1, 5, 80, 600), pick(1.0, 0.9, 0.3)),
            *(pick(0.0, 0.05), pick(1.0, 1.05, 1.4), pick(0.0, 0.5), pick(0.0, 0.3)),
        )
        for _ in range(rows)
    ]
    numbers = [uniform(seed, row) for row in range(rows)]
    if not full:
        return Case(x, settings, numbers)
    counts = (rng.random((rows, vocab)) < 0.2) * rng.integers(0, 9, (rows, vocab))
    allowed = rng.random((rows, vocab)) < 0.5
    allowed[:, 3] = True
    last = rng.integers(-1, vocab, rows).astype(np.int32)
    bias = rng.normal(size=(rows, vocab)).astype(np.float32)
    return Case(x, settings, numbers, counts, last, bias, allowed)


KINDS = ("normal", "peaked", "ties", "flat")


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [9, 257, 3000])
def test_sample_equals_its_definition(vocab: int, kind: str, full: bool) -> None:
    for seed in range(4):
        case = draw(seed, 4, vocab, kind, full)
        drawn = sample(*case.arrays(mx.float32), use_kernel=False)
        expect_drawn(case, drawn.tokens, drawn.logprobs)


# Blocks that are filled and not, fewer blocks than candidates asked for, more than threads.
@pytest.mark.parametrize("dtype", twins.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "full"), [(8, True), (257, False), (700, True)])
def test_the_kernel_equals_the_definition(
    vocab: int, full: bool, kind: str, dtype: mx.Dtype
) -> None:
    case = draw(5, 3, vocab, kind, full).rounded(dtype)
    same = sample(*case.arrays(dtype), use_kernel=False)
    with twins.kernels():
        drawn = sample(*case.arrays(dtype), use_kernel=True)
        mx.eval(drawn.tokens, drawn.logprobs)
    twins.same_kind(drawn[:2], same[:2])
    expect_drawn(case, drawn.tokens, drawn.logprobs)
    assert (drawn.seen is None) == (same.seen is None)
    if drawn.seen is not None and same.seen is not None:
        assert mx.array_equal(drawn.seen.counts, same.seen.counts)
        assert mx.array_equal(drawn.seen.last, drawn.tokens.astype(mx.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks(kind: str) -> None:
    """As many as the model's vocabulary has: the bound by the blocks' best is at work."""
    case = draw(6, 2, 128_000, kind, full=False)
    limits = [RECOMMENDED, RowSampling(1.0, top_p=0.9)] * 2
    for temperature, settings in ((0.7, limits[:2]), (1.3, limits[2:])):
        rows = [row._replace(temperature=temperature) for row in settings]
        given = case._replace(rows=rows)
        reference = sample(*given.arrays(mx.bfloat16), use_kernel=False)
        with twins.kernels(checked=False):
            drawn = sample(*given.arrays(mx.bfloat16), use_kernel=True)
            mx.eval(drawn.tokens, drawn.logprobs)
        expect_drawn(given.rounded(mx.bfloat16), drawn.tokens, drawn.logprobs)
        # Sums of so many equal shares are not the same in another order.
        assert kind == "flat" or drawn.tokens.tolist() == reference.tokens.tolist()


LIMITED = [
    RECOMMENDED, RowSampling(0.0), RowSampling(1.0), RowSampling(1.0, top_k=3),
    RowSampling(1.0, top_k=900), RowSampling(3.0, top_p=0.6), RowSampling(1.0, top_p=1e-6),
    RowSampling(1.0, min_p=0.1), RowSampling(2.0, 40, 0.8, 0.02),
]  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 3, 1000])
@pytest.mark.parametrize("room_for", [2, 32, 1024])
def test_where_candidates_exceed_the_room(
    room_for: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranked by counting or found bit by bit: the same is kept."""
    monkeypatch.setattr(room, "ROOM", max(room_for, 32))
    monkeypatch.setattr(room, "THREADS", 32)
    monkeypatch.setattr(room, "TRIED", blocks)
    rng = np.random.default_rng(blocks)
    for spread in (0.3, 4.0):
        logits = np.round(rng.normal(size=(len(LIMITED), 1500)) * spread * 8) / 8
        case = Case(logits, LIMITED, rng.random(len(LIMITED)).astype(np.float32).tolist())
        with twins.kernels(checked=False):
            drawn = sample(*case.arrays(mx.float32), use_kernel=True)
            mx.eval(drawn.tokens, drawn.logprobs)
        expect_drawn(case, drawn.tokens, drawn.logprobs)


@pytest.mark.parametrize("use_kernel", [False, True])
@pytest.mark.parametrize("dtype", twins.DTYPES)
def test_rows_draw_what_they_draw_alone(dtype: mx.Dtype, use_kernel: bool) -> None:
    case = draw(7, 8, 600, "ties")
    with twins.kernels(checked=False):
        together = sample(*case.arrays(dtype), use_kernel=use_kernel)
        alone = [sample(*case.alone(i).arrays(dtype), use_kernel=use_kernel) for i in range(8)]
        mx.eval(together.tokens, [one.tokens for one in alone])
    assert together.tokens.tolist() == [one.tokens.item() for one in alone]
    assert together.logprobs.tolist() == [one.logprobs.item() for one in alone]


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("use_kernel", [False, True])
@pytest.mark.parametrize("row", [RowSampling(), RowSampling(1.0, 3), RowSampling(1.0, 0, 0.9, 0.1)])
@pytest.mark.parametrize(
    ("values", "among"),
    [
        ([NAN, 1.0, NAN, 40.0], {3}),
        ([-INF, -INF, 5.0, -INF], {2}),
        ([INF, 1.0, 2.0, 3.0], {0}),
        ([1e-40, 0.0, -0.0, -1e-40, -50.0], {0, 1, 2, 3}),
        ([-1e38, 3e38, -3e38, 1.0], {1}),
        ([-5.0, -5.0, -90.0, -90.0], {0, 1}),
    ],
)
def test_extreme_logits(
    values: list[float], among: set[int], row: RowSampling, use_kernel: bool
) -> None:
    logits = mx.array([values + [-1000.0] * (300 - len(values))])
    with twins.kernels(checked=False):
        for number in (2**-24, 0.5, 1 - 2**-24):
            drawn = sample(logits, [row], [number], use_kernel=use_kernel)
            mx.eval(drawn.tokens)
            assert drawn.tokens.item() in among
            if row.temperature == 0:
                assert drawn.tokens.item() == min(among)


@pytest.mark.parametrize("use_kernel", [False, True])
def test_what_a_mask_leaves_and_what_a_bias_forbids(use_kernel: bool) -> None:
    logits = mx.array(np.linspace(9, 0, 40, dtype=np.float32)[None])
    only = mx.arange(40)[None] == 33
    forbidden = mx.where(mx.arange(40)[None] < 7, -mx.inf, 0.0)
    with twins.kernels(checked=False):
        for row in (RowSampling(), RowSampling(1.0), RowSampling(0.5, 4), RowSampling(1.0, 0, 0.5)):
            masked = sample(logits, [row], [0.99], None, None, only, use_kernel=use_kernel)
            biased = sample(logits, [row], [0.0], None, forbidden, use_kernel=use_kernel)
            mx.eval(masked.tokens, biased.tokens)
            assert masked.tokens.item() == 33
            assert biased.tokens.item() == 7


@pytest.mark.parametrize("use_kernel", [False, True])
def test_counts_do_not_wrap(use_kernel: bool) -> None:
    counts = mx.array([[65535, 65534, 0, 1, 2, 65533, 7, 8]], mx.uint16)
    wanted = {0: 65535, 1: 65535, 2: 3, 3: 3, 4: 5, 5: 65535, 7: 11}
    for last, count in wanted.items():
        with twins.kernels(checked=False):
            seen = Seen(counts, mx.array([last], mx.int32))
            after = sample(mx.zeros((1, 8)), [RowSampling()], [0.0], seen, use_kernel=use_kernel)
            assert after.seen is not None
            mx.eval(after.seen.counts)
        expected = np.array(counts[0])
        expected[last] = count
        np.testing.assert_array_equal(np.array(after.seen.counts[0]), expected)


def test_numbers_are_spread_evenly_and_follow_from_seed_and_draw() -> None:
    numbers = np.array([uniform(seed, draw) for seed in range(40) for draw in range(500)])
    assert 0 < numbers.min() < numbers.max() < 1
    # 20,000 numbers in 20 bins of 1,000 each: four standard deviations are 123.
    assert np.abs(np.histogram(numbers, 20, (0, 1))[0] - 1000).max() < 123
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert uniform(3, 4) == uniform(3, 4) != uniform(4, 3)
    assert len(set(numbers)) > 19_900
    assert float(np.float32(uniform(1, 1))) == uniform(1, 1)
    assert uniform(-5, 0) != uniform(2**70, 0)


def test_the_kernel_states_its_limits() -> None:
    row, number = [RowSampling()], [0.0]
    with twins.kernels():
        for logits, bias, reason in (
            (mx.zeros((1, 7)), None, "rows of 8 to 262144 logits"),
            (mx.zeros((1, 9), mx.int32), None, "got mlx.core.int32"),
            (mx.zeros((1, 9)), mx.zeros((1, 8)), "a bias and a mask for each logit"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                sample(logits, row, number, None, bias, use_kernel=True)
        assert sample(mx.zeros((1, 7)), row, number).tokens.item() == 0


def test_without_metal_the_reference_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "available", lambda: False)
    drawn = sample(mx.array([[0.0, 2.0, 1.0]]), [RowSampling()], [0.0])
    assert drawn.tokens.item() == 1
    exact = np.log(np.exp(2) / np.exp([0, 1, 2]).sum())
    np.testing.assert_allclose(as_numpy(drawn.logprobs), exact, rtol=1e-6)
