"""Messages of a chat request in the form templates read, and what is wrong with wrong ones."""

from typing import Any

import pytest

from lfm_mlx.chatml.messages import template_messages
from lfm_mlx.errors import InputError

ASK = {"role": "user", "content": "Hi"}


def call(name: str, id: str | None = None, arguments: Any = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(text: str, id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": id}


def test_content_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert template_messages([{"role": "user", "content": parts}]) == [
        {"role": "user", "content": "one two"}
    ]


def test_arguments_become_a_mapping() -> None:
    given = [ASK, calling(call("f", arguments='{"a": 1}'), call("g", arguments=""))]
    functions = [it["function"] for it in template_messages(given)[1]["tool_calls"]]
    assert [it["arguments"] for it in functions] == [{"a": 1}, {}]
    ready = [ASK, calling(call("f", arguments={"a": [1]}))]
    assert template_messages(ready)[1]["tool_calls"][0]["function"]["arguments"] == {"a": [1]}


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
def test_reasoning_becomes_thinking(key: str) -> None:
    answer = {"role": "assistant", "content": "a", key: "hm"}
    assert template_messages([ASK, answer])[1] == {
        "role": "assistant",
        "content": "a",
        "thinking": "hm",
    }


def test_no_reasoning_is_no_thinking() -> None:
    for key, value in (("reasoning_content", ""), ("thinking", None)):
        answer = {"role": "assistant", "content": "a", key: value}
        assert "thinking" not in template_messages([ASK, answer])[1]
    assert template_messages([ASK, {"role": "assistant", "thinking": ""}])[1]["thinking"] == ""


def test_keys_without_a_value_are_left_out() -> None:
    answer = {"role": "assistant", "content": "a", "tool_calls": [], "refusal": None}
    assert template_messages([ASK, answer])[1] == {"role": "assistant", "content": "a"}


def test_developers_speak_as_the_system() -> None:
    assert template_messages([{"role": "developer", "content": "x"}])[0]["role"] == "system"


def test_tool_results_stand_in_the_order_of_their_calls() -> None:
    asked = calling(call("f", "1"), call("g", "2"), call("h", "3"))
    answered = [result("c", "3"), result("a", "1"), result("b", "2")]
    found = template_messages([ASK, asked, *answered, ASK])
    assert [message["content"] for message in found[2:]] == ["a", "b", "c", "Hi"]
    unnamed = [result("x"), result("y")]
    assert [it["content"] for it in template_messages([asked, *unnamed])[1:]] == ["x", "y"]


WRONG = {
    "messages: expected a list; got str": "Hi",
    "messages: expected at least one": [],
    "messages[1]: expected an object; got str": [ASK, "Hi"],
    "messages[0] (robot): role is 'robot'; expected system, user, assistant, tool": [
        {"role": "robot", "content": "x"}
    ],
    "messages[0]: role is None": [{"content": "x"}],
    "messages[1] (user): content is missing": [ASK, {"role": "user"}],
    "messages[0] (system): content is missing": [{"role": "system", "content": None}],
    "messages[0] (user): content is of type int": [{"role": "user", "content": 27}],
    "messages[0] (user): content part 'image_url'; this model reads parts of type 'text'": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
    ],
    "messages[0] (user): content part 'int'": [{"role": "user", "content": [3]}],
    "messages[0] (user): content part 'text'": [{"role": "user", "content": [{"type": "text"}]}],
    "messages[0] (user): tool_calls belong to a message of the assistant": [
        {**ASK, "tool_calls": [call("f")]}
    ],
    "messages[1] (assistant): content is missing, and so are tool_calls": [
        ASK,
        {"role": "assistant", "content": None},
    ],
    "messages[1] (assistant): function_call is not supported; use tool_calls": [
        ASK,
        {"role": "assistant", "content": "", "function_call": {"name": "f"}},
    ],
    "messages[1] (assistant): reasoning_content is of type list; expected text": [
        ASK,
        {"role": "assistant", "content": "", "reasoning_content": ["a"]},
    ],
    "messages[1] (assistant): tool_calls: expected a list": [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": {"name": "f"}},
    ],
    "messages[1] (assistant): tool_calls[1]: expected a function with a name": [
        ASK,
        calling(call("f"), {"name": "f"}),
    ],
    "messages[1] (assistant): tool_calls[0] (f): arguments: no JSON": [
        ASK,
        calling(call("f", arguments="{a: 1}")),
    ],
    "messages[1] (assistant): tool_calls[0] (f): arguments: expected a JSON object": [
        ASK,
        calling(call("f", arguments="[1]")),
    ],
    "messages[1] (tool): no call of the assistant before it is left to answer": [ASK, result("x")],
    "messages[3] (tool): no call of the assistant before it is left to answer": [
        ASK,
        calling(call("f")),
        result("x"),
        result("y"),
    ],
    "messages[2] (tool): tool_call_id '9' names no call; expected '1' or '2'": [
        ASK,
        calling(call("f", "1"), call("g", "2")),
        result("x", "9"),
    ],
    "messages[3] (tool): tool_call_id '1' was answered already": [
        ASK,
        calling(call("f", "1"), call("g", "2")),
        result("x", "1"),
        result("y", "1"),
    ],
}


@pytest.mark.parametrize("problem", WRONG)
def test_wrong_messages_are_named_with_their_fault(problem: str) -> None:
    with pytest.raises(InputError) as error:
        template_messages(WRONG[problem])  # pyright: ignore
    assert str(error.value).startswith(problem)
    assert "\n" not in str(error.value)
