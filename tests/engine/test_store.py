"""Stored prefixes: which one a prompt goes on from, what that leaves, and why no more is reused."""

import mlx.core as mx
import numpy as np
import pytest
from caches import build, draw, expect_same, fresh

from lfm_mlx.engine.job import Prefix
from lfm_mlx.engine.store import Entry, Source, Store

MODEL = build("odd")
TOKENS = np.array(draw(4, 60)).tolist()


def stored(*lengths: int, owner: str = "") -> tuple[Store, list[Entry]]:
    evicted: list[Entry] = []
    store = Store(MODEL.config, evicted.append)
    for length in lengths:
        tokens = [*TOKENS[:length], 200 + len(store)]
        store.put(tokens, fresh(MODEL, row_of(tokens)), owner)
    return store, evicted


def row_of(tokens: list[int]) -> mx.array:
    return mx.array([tokens], mx.int32)


@pytest.mark.parametrize(
    ("prompt", "prefix"),
    [
        ([*TOKENS[:40], 200, 1], Prefix(41, "whole")),
        ([*TOKENS[:40], 200, 1, 2], Prefix(41, "end")),
        ([*TOKENS[:40], 7, 1], Prefix(40, "differs", 200, 7)),
        ([*TOKENS[:40], 200], Prefix(40, "whole")),
        ([*TOKENS[:5], 201, 1], Prefix(0, "short")),
        ([(TOKENS[0] + 1) % 200, 1], Prefix(0, "differs", TOKENS[0], (TOKENS[0] + 1) % 200)),
    ],
)
def test_the_reason_a_prefix_ends_is_told(prompt: list[int], prefix: Prefix) -> None:
    store, _ = stored(40)
    source, found = store.find(prompt, "")
    assert found == prefix
    assert (source is None) == (found.tokens == 0)


def test_what_a_prompt_goes_on_from_its_end_is_moved_and_of_the_rest_a_part_copied() -> None:
    store, _ = stored(40, 50)
    for prompt, left in (([*TOKENS[:45], 3], 2), ([*TOKENS[:40], 200, 9], 1)):
        source, prefix = store.find(prompt, "")
        assert source is not None
        cache = store.use(source, prefix)
        expect_same(MODEL, cache, row_of(prompt[: prefix.tokens]), row_of([5]))
        assert len(store) == left


def test_owners_do_not_share_and_nothing_stored_has_no_reason() -> None:
    store, _ = stored(40, owner="one")
    assert store.find([*TOKENS[:40], 200, 1], "other") == (None, Prefix())


def test_the_least_recently_used_gives_way_and_a_spared_one_stays() -> None:
    store, evicted = stored(20, 30, 40)
    first = store.entries[0]
    store.use(Source(first.tokens, first.cache, "", first), Prefix(10, "differs"))
    store.evict(store.nbytes - 1, spared=store.entries[1])
    assert [len(entry.tokens) for entry in evicted] == [41]
    assert [len(entry.tokens) for entry in store.entries] == [21, 31]


def test_what_goes_on_from_another_replaces_it() -> None:
    store, _ = stored()
    for length in (20, 30, 25):
        tokens = TOKENS[:length]
        store.put(tokens, fresh(MODEL, row_of(tokens)))
    assert [len(entry.tokens) for entry in store.entries] == [30]
