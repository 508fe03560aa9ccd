r"""A grammar of the tool calls that fit the tools, in llguidance's Lark.

Calls are Python-like, as the model writes them: `[f(a='x', n=3)]`, arguments in the schema's order.
A string comes in single quotes while it holds no quote and no backslash, else as JSON: so every
call reads back as it was meant. Where a schema says more than which argument is what (`$ref`,
`anyOf`, …), or a name would not read back, the block is JSON: `[{"name": …, "arguments": {…}}]`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from lfm_mlx.tool_calls.schema import Schema

# Calls of one block, where the choice is the model's: a block must end.
MOST_CALLS = 16
# Schemas of arguments that have a form of their own in Python's syntax; all others are JSON.
_PLAIN = {
    "string": r"""/'[^'\\]*'/ | %json {"type": "string"}""",
    "integer": r"/-?(0|[1-9][0-9]{0,17})/",
    "number": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?(e[-+]?[0-9]{1,2})?/",
    "boolean": '"True" | "False"',
}
_ANNOTATIONS = {"title", "description", "default", "examples", "type", "deprecated", "$comment"}
_OBJECT_KEYS = {*_ANNOTATIONS, "properties", "required", "additionalProperties", "$schema"}
_NAME = re.compile(r"\w[\w.:/-]*")
_KEY = re.compile(r"\w[\w.-]*")
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def block_rules(parameters: Mapping[str, Schema], most: int = MOST_CALLS) -> str:
    """Rules whose `calls` is a block, without its tags, of 1 to `most` calls of these tools."""
    python = all(_is_python(name, schema) for name, schema in parameters.items())
    write = _python_call if python else _json_call
    rules = [
        rule
        for at, (name, schema) in enumerate(parameters.items())
        for rule in write(f"call_{at}", name, schema)
    ]
    names = " | ".join(f"call_{at}" for at in range(len(parameters)))
    more = f' (", " call){{0,{most - 1}}}' if most > 1 else ""
    return "\n".join([f'calls: "[" call{more} "]"', f"call: {names}", *rules])


def json_rule(schema: Any, style: Mapping[str, Any] = _JSON_STYLE) -> str:
    """Rule for a value of this JSON Schema, written as JSON."""
    schema = {True: {}, False: {"enum": []}}[schema] if isinstance(schema, bool) else schema
    return f"%json {json.dumps({**schema, 'x-guidance': style}, ensure_ascii=False)}"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _is_python(name: str, schema: Schema) -> bool:
    """Whether each argument's own schema is all there is to know about a call."""
    properties = schema.get("properties") or {}
    return (
        bool(_NAME.fullmatch(name))
        and schema.get("type", "object") == "object"
        and schema.keys() <= _OBJECT_KEYS
        and set(schema.get("required", ())) <= properties.keys()
        and all(_KEY.fullmatch(key) for key in properties)
        and "$ref" not in json.dumps(properties)
        and properties.keys() != {"properties"}
    )


def _python_call(rule: str, name: str, schema: Schema) -> list[str]:
    properties = schema.get("properties") or {}
    required = set(schema.get("required", ()))
    offered = [key for key in properties if key in required or properties[key] is not False]
    rules = [f"{rule}_{at}" for at in range(len(offered))]
    listed = _in_order(rules, [key in required for key in offered])
    call = [literal(f"{name}("), *([listed] if listed else []), literal(")")]
    arguments = (f"{literal(f'{key}=')} ({_value(properties[key])})" for key in offered)
    return [
        f"{rule}: {' '.join(call)}",
        *(f"{name}: {argument}" for name, argument in zip(rules, arguments, strict=True)),
    ]


def _in_order(arguments: list[str], required: list[bool]) -> str:
    """These arguments, each at most once and in this order, with commas between."""
    later = [
        f'", " {argument}' if needed else f'(", " {argument})?'
        for argument, needed in zip(arguments, required, strict=True)
    ]
    last_first = required.index(True) if True in required else len(arguments) - 1
    firsts = [" ".join([arguments[at], *later[at + 1 :]]) for at in range(last_first + 1)]
    if not firsts:
        return ""
    return f"({' | '.join(firsts)}){'' if True in required else '?'}"


def _value(schema: Any) -> str:
    if isinstance(schema, Mapping):
        kind, keywords = schema.get("type"), schema.keys() - _ANNOTATIONS
        if isinstance(kind, str) and kind in _PLAIN and not keywords:
            return _PLAIN[kind]
        listed = schema.get("enum") or ()
        if kind in ("string", None) and keywords == {"enum"} and _are_quotable(listed):
            return " | ".join(literal(f"'{option}'") for option in listed)
    return json_rule(schema)


def _are_quotable(options: Any) -> bool:
    return bool(options) and all(
        isinstance(option, str) and not re.search(r"['\\]", option) for option in options
    )


def _json_call(rule: str, name: str, schema: Schema) -> list[str]:
    opening = literal(f'{{"name": {literal(name)}, "arguments": ')
    return [f"{rule}: {opening} {json_rule({'type': 'object', **schema})} {literal('}')}"]
