"""Conversations repeat with their seed, end with an answer, and call what they list."""

from itertools import islice
from random import Random

from conversations import KIND_WEIGHTS, conversation, training_conversations
from exchanges import GREETINGS

TRAINED = list(islice(training_conversations(0), 3000))


def replies(conversation):
    return [m for m in conversation.messages if m["role"] == "assistant"]


def test_training_conversations_repeat_with_the_seed():
    assert list(islice(training_conversations(0), 300)) == TRAINED[:300]
    assert list(islice(training_conversations(1), 300)) != TRAINED[:300]


def test_training_conversations_end_with_an_answer_of_every_kind():
    assert {c.kind for c in TRAINED} == set(KIND_WEIGHTS)
    assert all(c.messages[-1]["role"] == "assistant" for c in TRAINED)


def test_only_greetings_go_without_thinking():
    silent = {r["content"] for c in TRAINED for r in replies(c) if "thinking" not in r}
    assert silent == {answer for _, answer in GREETINGS}


def test_tool_calls_name_a_listed_tool_and_its_parameters():
    for drawn in TRAINED:
        listed = {t["function"]["name"]: t["function"] for t in drawn.tools or ()}
        for call in (c["function"] for r in replies(drawn) for c in r.get("tool_calls", ())):
            properties = listed[call["name"]]["parameters"]["properties"]
            assert list(call["arguments"]) == list(properties)


def test_conversation_takes_its_kind_from_the_last_exchange():
    drawn = conversation(Random(0), "greeting")
    assert drawn.messages[-1]["content"] in {answer for _, answer in GREETINGS}
