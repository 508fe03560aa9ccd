"""Prompts read in one pass: each cache is as if it had been read alone, and knows its tokens."""

import mlx.core as mx
import pytest
from caches import CONFIGS, build, draw, expect_same

from lfm_mlx.cache.cache import tokens_read
from lfm_mlx.cache.rewind import rewind
from lfm_mlx.engine.prefill import Part, read_parts, read_together


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_unequal_length_are_read_as_alone(name: str) -> None:
    model = build(name)
    rows = [draw(seed, 60)[:length].tolist() for seed, length in enumerate((41, 7, 1, 44))]
    caches = [model.make_cache() for _ in rows]
    # The second pass goes on from what the first has read, one row from where it was rewound to.
    read_parts(model, [Part(cache, row[:-3]) for cache, row in zip(caches, rows, strict=True)
                       if len(row) > 3])  # fmt: skip
    rewind(caches[3], 20)
    left = [38, 4, 0, 20]
    read_parts(model, [Part(c, r[n:]) for c, r, n in zip(caches, rows, left, strict=True)])
    for cache, row in zip(caches, rows, strict=True):
        assert tokens_read(cache) == row
        rewind(cache, max(0, len(row) - 2))
        expect_same(model, cache, mx.array([row[:-2]], mx.int32), mx.array([[5]]))


@pytest.mark.parametrize(
    ("lengths", "most", "count"),
    [
        ([10], 5, 1),
        ([10, 10, 10], 30, 3),
        ([10, 10, 10], 29, 2),
        ([100, 50], 1000, 2),
        ([100, 49], 1000, 1),
        ([50, 100], 1000, 2),
    ],
)
def test_a_pass_has_room_and_little_padding(lengths: list[int], most: int, count: int) -> None:
    assert read_together(lengths, most) == count
