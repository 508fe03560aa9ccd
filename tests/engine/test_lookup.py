"""What is drafted, against the text searched from its beginning; and when."""

import numpy as np
import pytest

from lfm_mlx.engine.lookup import LONGEST_DRAFT, LONGEST_RUN, SHORTEST_RUN, NGramIndex, PromptLookup
from lfm_mlx.errors import InputError


def searched(tokens: list[int], length: int) -> int | None:
    """The index after the latest earlier occurrence of the last `length` tokens."""
    if len(tokens) < length:
        return None
    ends = range(len(tokens) - 1, length - 1, -1)
    return next((end for end in ends if tokens[end - length : end] == tokens[-length:]), None)


@pytest.mark.parametrize("kinds", [2, 4, 20])
@pytest.mark.parametrize("seed", range(3))
def test_the_match_is_the_longest_and_latest(kinds: int, seed: int) -> None:
    text = NGramIndex()
    for token in np.random.default_rng(seed).integers(0, kinds, 300).tolist():
        text.append(token)
        found = {n: searched(text.tokens, n) for n in range(LONGEST_RUN, SHORTEST_RUN - 1, -1)}
        longest = next((length for length, end in found.items() if end is not None), 0)
        if text.source is None:
            assert longest == 0
            continue
        assert text.run >= longest
        assert (
            text.tokens[text.source - text.run : text.source]
            == text.tokens[len(text.tokens) - text.run :]
        )
        if text.run <= LONGEST_RUN:
            assert text.source == found[text.run]


def test_a_continuation_is_what_came_next() -> None:
    text = NGramIndex([1, 2, 3, 4, 5, 9, 2, 3])
    assert text.continuation(4) == [4, 5, 9, 2]
    assert NGramIndex([1, 2, 3]).continuation(4) == []


def test_a_continuation_repeats_what_repeats() -> None:
    assert NGramIndex([7, 1, 2, 3, 1, 2, 3]).continuation(7) == [1, 2, 3, 1, 2, 3, 1]


class Counted(int):
    hashes = 0

    def __hash__(self) -> int:
        Counted.hashes += 1
        return super().__hash__()


def test_a_token_costs_the_same_however_long_the_text_is() -> None:
    def cost(length: int) -> int:
        text = NGramIndex(map(Counted, np.random.default_rng(0).integers(0, 50, length).tolist()))
        before = Counted.hashes
        text.extend(map(Counted, range(20)))
        return Counted.hashes - before

    assert cost(4000) == cost(40)


def drafted(lookup: PromptLookup, tokens: list[int]) -> list[int]:
    """What is proposed after the last of these tokens has been waited for."""
    lookup.text.extend(tokens[:-1])
    assert lookup.should_draft()
    return lookup.draft(tokens[-1], 100)


def test_success_makes_drafts_longer_up_to_the_longest() -> None:
    lookup, sizes, token = PromptLookup(12), [], 0
    lookup.text.extend([*range(200), *range(3)])
    for token in range(3, 60):
        draft = lookup.draft(token, 100)
        sizes.append(len(draft))
        lookup.record(len(draft), len(draft))
    assert sizes[:5] == [2, 4, 8, 12, 12]
    assert lookup.accepted == lookup.drafted == sum(sizes)


def test_failure_asks_for_a_match_of_twice_the_length() -> None:
    lookup = PromptLookup()
    assert drafted(lookup, [*range(100), *range(3)]) == [3, 4]
    lookup.record(2, 0)
    for token in range(3, 40):
        promising = lookup.should_draft()
        assert promising == (lookup.text.run >= lookup.needed)
        if promising:
            lookup.record(len(lookup.draft(token, 100)), 0)
        else:
            lookup.text.append(token)
    assert lookup.drafted == 2 * len([2, 4, 8, 16, 32])


def test_a_draft_in_part_right_makes_the_next_one_shorter() -> None:
    lookup = PromptLookup()
    lookup.text.extend([*range(50), *range(3)])
    for token in (3, 4):
        lookup.record(len(lookup.draft(token, 100)), 2)
    lookup.record(4, 3)
    assert len(lookup.draft(5, 100)) == 3


def test_nothing_is_drafted_after_another_token_than_expected() -> None:
    lookup = PromptLookup()
    assert drafted(lookup, [*range(10), 0, 1, 77]) == []
    assert lookup.needed == 2 * SHORTEST_RUN


def test_no_more_is_drafted_than_there_is_room_for() -> None:
    lookup = PromptLookup()
    lookup.text.extend([*range(10), 0, 1])
    assert lookup.draft(2, 1) == [3]
    assert PromptLookup().longest == LONGEST_DRAFT


@pytest.mark.parametrize("longest", [0, -3])
def test_an_impossible_length_is_refused(longest: int) -> None:
    with pytest.raises(InputError, match=f"cannot draft {longest} tokens"):
        PromptLookup(longest)
