"""Thinking budgets on token lists: what is allowed, what is counted, where the answer begins."""

from hypothesis import example, given
from hypothesis import strategies as st
from walks import STOPS, VOCAB_SIZE, allowed_tokens

from lfm_mlx.engine.constraint import OneOf
from lfm_mlx.engine.thinking import Thinking, ThinkTags

OPEN, CLOSE, STOP = 50, 51, min(STOPS)
TAGS = ThinkTags(OPEN, CLOSE, [60, 61])


def thinking(budget: int | None = None, choices: list[list[int]] | None = None) -> Thinking:
    answer = OneOf(choices, STOPS, VOCAB_SIZE) if choices else None
    return Thinking(TAGS, STOPS, VOCAB_SIZE, budget=budget, answer=answer)


def follow(constraint: Thinking, wishes: list[int]) -> list[int]:
    """The tokens that come when the model wishes for these: what is forbidden is replaced."""
    came = []
    for wish in wishes:
        tokens = allowed_tokens(constraint)
        token = wish if tokens is None or wish in tokens else tokens[0]
        came.append(token)
        constraint.advance(token)
    return came


def test_a_spent_budget_closes_the_block() -> None:
    constraint = thinking(budget=3)
    wishes = [OPEN, 1, 2, 3, 9, 9, 9, 8]
    assert follow(constraint, wishes) == [OPEN, 1, 2, 3, 60, 61, CLOSE, 8]
    assert constraint.thought_tokens == 3
    assert constraint.before_answer == [OPEN, 1, 2, 3, 60, 61, CLOSE]
    assert constraint.begun


def test_what_ends_within_its_budget_is_left_alone() -> None:
    wishes = [OPEN, 1, 2, CLOSE, 8, STOP]
    assert follow(thinking(budget=3), wishes) == wishes
    assert follow(thinking(), wishes) == wishes


def test_no_thinking_is_an_empty_block_and_no_other() -> None:
    constraint = thinking(budget=0)
    assert follow(constraint, [9, 9, 8])[:3] == [OPEN, CLOSE, 8]
    assert not {OPEN, CLOSE} & set(allowed_tokens(constraint) or [])


def test_a_model_that_never_thinks_is_not_disturbed() -> None:
    constraint = thinking(budget=2)
    assert follow(constraint, [5, 6, 7, STOP]) == [5, 6, 7, STOP]
    assert constraint.begun
    assert constraint.before_answer == []
    bare = Thinking(None, STOPS, VOCAB_SIZE, budget=0)
    assert follow(bare, [5, 6, STOP]) == [5, 6, STOP]


def test_the_budget_counts_all_blocks_of_an_answer() -> None:
    constraint = thinking(budget=3)
    came = follow(constraint, [OPEN, 1, CLOSE, 8, OPEN, 2, 3, 9, 9, 9, 8])
    assert came == [OPEN, 1, CLOSE, 8, OPEN, 2, 3, 60, 61, CLOSE, 8]


def test_an_answer_is_owed_after_thinking() -> None:
    constraint = thinking(choices=[[70, 71]])
    assert sorted(allowed_tokens(constraint) or []) == [OPEN, 70]
    constraint.advance(OPEN)
    assert STOP not in (allowed_tokens(constraint) or [STOP])
    constraint.advance(1)
    constraint.advance(CLOSE)
    assert allowed_tokens(constraint) == [70]
    assert follow(constraint, [0, 0, STOP]) == [70, 71, STOP]
    assert constraint.before_answer == [OPEN, 1, CLOSE]


@given(
    st.lists(st.sampled_from([1, 2, 60, OPEN, CLOSE]), max_size=40),
    st.integers(0, 6),
    st.sampled_from([None, [[70, 71], [70]]]),
)
@example([1, 1, 1, CLOSE, 1, 1, OPEN, 1, 1, 1, 1], 3, [[70, 71], [70]])
def test_thoughts_never_exceed_their_budget(
    wishes: list[int], budget: int, choices: list[list[int]] | None
) -> None:
    constraint = thinking(budget, choices)
    came = follow(constraint, wishes)
    # An answer is over at its stop token: nothing that is wished for behind it is ever drawn.
    came = came[: came.index(STOP)] if STOP in came else came
    assert constraint.thought_tokens <= budget
    inside = thought = 0
    for token in came:
        thought += inside and token != CLOSE
        inside = (inside or token == OPEN) and token != CLOSE
    assert thought <= budget + len(TAGS.last_words)
