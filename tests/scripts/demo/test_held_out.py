"""Held-out examples: an honest split, true answers, a strict scorer."""

import re
from itertools import islice

import pytest
from conversations import training_conversations
from held_out import HELD_OUT_KINDS, held_out, is_correct
from tool_kinds import TOOLS

TRAINED = list(islice(training_conversations(0), 3000))


def questions(conversations):
    return {m["content"] for c in conversations for m in c.messages if m["role"] == "user"}


def raw_reply(example):
    thinking = "<think>because</think>" if example.thinks else ""
    return f"{thinking}{example.expected}<|im_end|>"


@pytest.mark.parametrize("kind", HELD_OUT_KINDS)
def test_held_out_repeats_with_the_seed(kind):
    assert held_out(kind, 20, seed=3) == held_out(kind, 20, seed=3)
    assert held_out(kind, 20, seed=3) != held_out(kind, 20, seed=4)


def test_held_out_refuses_a_kind_it_does_not_know():
    with pytest.raises(ValueError, match="'riddle'; expected one of sum, tool_call"):
        held_out("riddle", 1)


@pytest.mark.parametrize("kind", ["sum", "tool_call", "sentiment", "decline"])
def test_held_out_questions_are_never_trained(kind):
    asked = {e.messages[-1]["content"] for e in held_out(kind, 200)}
    assert not asked & questions(TRAINED)


def test_sums_are_split_by_their_numbers():
    def pairs(texts):
        found = (re.search(r"(\d+) ?([-+]|plus|minus) ?(\d+)", text) for text in texts)
        signs = {"plus": "+", "minus": "-"}
        return {(m[1], signs.get(m[2], m[2]), m[3]) for m in found if m}

    trained = pairs(questions(TRAINED))
    asked = pairs(e.messages[-1]["content"] for e in held_out("sum", 300))
    assert len(asked) > 200
    assert not trained & asked


def test_sum_answers_are_true():
    for example in held_out("sum", 300):
        left, right = example.expected.rstrip(".").split(" = ")
        assert eval(left) == int(right)


def test_tool_arguments_are_copied_from_the_question():
    for example in held_out("tool_call", 200):
        question = example.messages[-1]["content"]
        for value in re.findall(r"='([^']*)'|=(\d+)", example.expected):
            assert "".join(value) in question


@pytest.mark.parametrize("kind", HELD_OUT_KINDS)
def test_is_correct_accepts_the_expected_reply_only(kind):
    for example in held_out(kind, 20):
        assert is_correct(example, raw_reply(example))
        assert not is_correct(example, raw_reply(example).replace(example.expected, "wrong"))
        assert not is_correct(example, "")


def test_is_correct_wants_thinking_exactly_where_it_belongs():
    greeting, total = held_out("greeting", 1)[0], held_out("sum", 1)[0]
    assert not is_correct(greeting, f"<think>hm</think>{greeting.expected}<|im_end|>")
    assert not is_correct(total, f"{total.expected}<|im_end|>")
    assert not is_correct(total, f"<think>{total.expected}<|im_end|>")


def test_decline_never_asks_for_a_listed_tool():
    for example in held_out("decline", 100):
        assert example.expected in {tool.without for tool in TOOLS.values()}
