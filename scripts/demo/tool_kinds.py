"""Kinds of tools: how schemas, questions, results and answers about each may look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import values

Result = dict[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool: the names a schema may give it, and what its values are."""

    names: tuple[str, ...]
    description: str
    draw: Callable[[Random, bool], Any]
    type: str


@dataclass(frozen=True)
class Tool:
    """A kind of tool. Phrasings and answers see the arguments as {0}, {1}.

    `answer` also sees the result's fields; `without` is the answer when no such tool is listed.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    phrasings: tuple[str, ...]
    result: Callable[[Random], Result]
    answer: str
    without: str


@dataclass(frozen=True)
class ListedTool:
    """A tool as one conversation lists it: with a chosen name and chosen parameter names."""

    tool: Tool
    name: str
    parameter_names: tuple[str, ...]


def _weather_result(rng: Random) -> Result:
    sky = rng.choice(values.NAMES["skies"])
    return {"temperature": rng.randint(-9, 39), "condition": sky}


def _time_result(rng: Random) -> Result:
    return {"time": f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"}


def _number_result(rng: Random) -> Result:
    return {"result": rng.randint(-999, 10 ** rng.randint(1, 6))}


def _text_result(rng: Random) -> Result:
    return {"result": values.words(rng, 1, 6)}


def _done_result(rng: Random) -> Result:
    return {"status": rng.choice(("ok", "done"))}


# The functions that the data file names.
VALUES: dict[str, Callable[[Random, bool], Any]] = {
    "city": values.city,
    "expression": values.expression,
    "phrase": values.phrase,
    "language": values.language,
    "minutes": values.minutes,
}
RESULTS: dict[str, Callable[[Random], Result]] = {
    "weather": _weather_result,
    "time": _time_result,
    "number": _number_result,
    "text": _text_result,
    "done": _done_result,
}


def _tool(data: dict[str, Any]) -> Tool:
    parameters = (
        Parameter(tuple(p["names"]), p["description"], VALUES[p["value"]], p["type"])
        for p in data["parameters"]
    )
    texts = {name: tuple(data[name]) for name in ("names", "descriptions", "phrasings")}
    return Tool(
        **texts,
        parameters=tuple(parameters),
        result=RESULTS[data["result"]],
        answer=data["answer"],
        without=data["without"],
    )


TOOLS: dict[str, Tool] = {kind: _tool(data) for kind, data in values.read("tools.json").items()}


def listed_tools(rng: Random, kinds: Sequence[str]) -> dict[str, ListedTool]:
    """Choose for each kind the names that one conversation lists it under."""
    listed = {}
    for kind in kinds:
        tool = TOOLS[kind]
        parameters = tuple(rng.choice(parameter.names) for parameter in tool.parameters)
        listed[kind] = ListedTool(tool, rng.choice(tool.names), parameters)
    return listed


def schema(rng: Random, listed: ListedTool) -> dict[str, Any]:
    """Return the JSON schema of a listed tool, more or less complete."""
    with_descriptions = rng.random() < 0.25
    properties: dict[str, Any] = {}
    for name, parameter in zip(listed.parameter_names, listed.tool.parameters, strict=True):
        properties[name] = {"type": parameter.type}
        if with_descriptions:
            properties[name]["description"] = parameter.description
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.75:
        parameters["required"] = list(properties)
    function = {
        "name": listed.name,
        "description": rng.choice(listed.tool.descriptions),
        "parameters": parameters,
    }
    return {"type": "function", "function": function}


def call_text(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the text of tool calls as the model writes them."""
    rendered = []
    for name, arguments in calls:
        written = (f"{k}='{v}'" if isinstance(v, str) else f"{k}={v}" for k, v in arguments.items())
        rendered.append(f"{name}({', '.join(written)})")
    return f"<|tool_call_start|>[{', '.join(rendered)}]<|tool_call_end|>"
