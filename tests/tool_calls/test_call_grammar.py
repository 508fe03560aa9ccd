"""Grammars of tool calls on random walks: every finished block is read back, and fits its tool."""

import re
from typing import Any

import jsonschema
import pytest
from walks import ADDED, VOCABULARY, walk

from lfm_mlx import chatml
from lfm_mlx.answer.control import Control
from lfm_mlx.engine.grammar import Grammar


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def taking(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


TEXT, NUMBER, WHOLE, TRUTH = ({"type": it} for it in ("string", "number", "integer", "boolean"))
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"], "description": "of temperature"}
PYTHON = [
    tool("now"),
    tool("get_weather", taking(["city"], city=TEXT, unit=UNIT, days=WHOLE)),
    tool("math.add-up", taking(["b"], a=NUMBER, b=NUMBER, exact=TRUTH)),
    tool("note", taking([], text=TEXT, tags={"type": "array", "items": TEXT, "maxItems": 2})),
    tool("move", taking(["to"], to={**taking(["x"], x=NUMBER), "additionalProperties": False})),
    tool("limit", taking(["n"], n={"type": "integer", "minimum": 3, "maximum": 70}, why={})),
    tool("odd", taking(["quote"], quote={"type": "string", "enum": ["it's", "a\\b"]}, none=False)),
    tool("maybe", taking(["a"], a={"type": ["integer", "null"]}, b={"const": "x"})),
]
JSON_ONLY = [
    tool("tree", {**taking(["n"], n={"$ref": "#/$defs/n"}), "$defs": {"n": TEXT}}),
    tool("any", {"anyOf": [taking(["a"], a=WHOLE), taking(["b"], b=TEXT)]}),
    tool("odd key", taking(["a b"], **{"a b": TRUTH})),
    tool("properties", taking(["properties"], properties={"type": "object"})),
    tool("pairs", {"type": "object", "additionalProperties": WHOLE, "maxProperties": 2}),
]

# An exponent that may be beyond float64.
HUGE = re.compile(r"\de\+?[1-9]\d{2}", re.IGNORECASE)


def blocks(tools: list[dict[str, Any]], choice: str, count: int) -> list[str]:
    """The finished blocks of some walks, tags checked and taken off."""
    lark = Control(tools=tools, tool_choice=choice).lark(ADDED)
    walks = [walk(Grammar(VOCABULARY, lark, "tools"), seed, most=400) for seed in range(count)]
    found = [tokens for tokens in walks if tokens is not None]
    assert len(found) >= count // 4, "hardly a call comes to its end"
    for tokens in found:
        assert tokens[0] == ADDED["<|tool_call_start|>"]
        assert tokens[-1] == ADDED["<|tool_call_end|>"]
    texts = [b"".join(VOCABULARY.words[it] for it in tokens[1:-1]).decode() for tokens in found]
    # JSON writes numbers that no float64 holds; reading refuses them (see test_parse).
    return [text for text in texts if not HUGE.search(text)]


def check(calls: tuple[chatml.Call, ...], tools: list[dict[str, Any]]) -> None:
    schemas = {it["function"]["name"]: it["function"]["parameters"] for it in tools}
    for call in calls:
        jsonschema.validate(call.arguments, schemas[call.name])
        assert not call.ambiguous


@pytest.mark.parametrize("offered", PYTHON + JSON_ONLY, ids=lambda it: it["function"]["name"])
def test_a_named_tool_is_called_once_with_arguments_that_fit(offered: dict[str, Any]) -> None:
    name = offered["function"]["name"]
    for text in blocks([offered, tool("other")], name, 10):
        calls = chatml.parse(text, [offered])
        assert [call.name for call in calls] == [name]
        check(calls, [offered])
        assert text.startswith('[{"name"') == (offered in JSON_ONLY)


@pytest.mark.parametrize("tools", [PYTHON, [*PYTHON[:2], *JSON_ONLY]], ids=["python", "json"])
def test_required_calls_one_tool_or_several(tools: list[dict[str, Any]]) -> None:
    counts = set()
    for text in blocks(tools, "required", 24):
        calls = chatml.parse(text, tools)
        check(calls, tools)
        counts.add(len(calls))
    assert 0 not in counts
    assert len(counts) > 1
