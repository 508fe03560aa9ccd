"""Masks, and answers that are one of several."""

import pytest
from walks import STOPS, VOCAB_SIZE, allowed_tokens, walk

from lfm_mlx.engine.constraint import OneOf, Without, all_but, only


def test_only_and_all_but_are_opposites() -> None:
    assert only([3, 5], 8).tolist() == [False, False, False, True, False, True, False, False]
    assert (only([3, 5], 8) != all_but([3, 5], 8)).all()


def test_without_never_allows_its_tokens() -> None:
    constraint = Without([7, 9], VOCAB_SIZE)
    for token in (1, 2):
        assert allowed_tokens(constraint) == [it for it in range(VOCAB_SIZE) if it not in (7, 9)]
        constraint.advance(token)


CHOICES = [[20, 21], [20, 21, 22], [30], [20, 40]]


@pytest.mark.parametrize("choice", CHOICES)
def test_one_of_leads_through_each_choice(choice: list[int]) -> None:
    constraint = OneOf(CHOICES, STOPS, VOCAB_SIZE)
    for token in choice:
        assert token in (allowed_tokens(constraint) or [])
        constraint.advance(token)
    assert set(allowed_tokens(constraint) or []) >= STOPS


def test_one_of_leads_nowhere_else() -> None:
    found = {tuple(walk(OneOf(CHOICES, STOPS, VOCAB_SIZE), seed) or ()) for seed in range(50)}
    assert found == {tuple(choice) for choice in CHOICES}
