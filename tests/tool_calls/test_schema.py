"""Values by JSON Schema: what fits, what is read anew, and what is refused."""

import json
from typing import Any

import pytest

from lfm_mlx.tool_calls.coerce import SchemaError
from lfm_mlx.tool_calls.literals import Bare
from lfm_mlx.tool_calls.schema import fit, parameters_of

NUMBER, INTEGER, STRING = {"type": "number"}, {"type": "integer"}, {"type": "string"}
MAYBE = {"type": ["string", "null"]}
POINT = {"type": "object", "properties": {"x": NUMBER, "y": NUMBER}, "required": ["x"]}
TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
}
FITS: list[tuple[Any, Any, Any]] = [
    (3, INTEGER, 3),
    (3.0, INTEGER, 3),
    ("3", INTEGER, 3),
    ("-3", INTEGER, -3),
    ("3.0", INTEGER, 3),
    (3, NUMBER, 3),
    ("3.5", NUMBER, 3.5),
    ("1e3", NUMBER, 1000.0),
    ("true", {"type": "boolean"}, True),
    ("False", {"type": "boolean"}, False),
    ("null", {"type": "null"}, None),
    (5, STRING, "5"),
    (Bare("007"), STRING, "007"),
    (Bare("1.10"), STRING, "1.10"),
    (Bare("True"), STRING, "True"),
    (Bare("1.10"), {}, 1.1),
    (Bare("celsius"), True, "celsius"),
    ("5", MAYBE, "5"),
    (Bare("None"), MAYBE, None),
    ("null", MAYBE, "null"),
    ("[1, 2]", {"type": "array"}, [1, 2]),
    ('{"x": "1"}', POINT, {"x": 1}),
    (["1", 2], {"type": "array", "items": INTEGER}, [1, 2]),
    ("2", {"enum": [1, 2]}, 2),
    ("b", {"enum": ["a", "b"]}, "b"),
    (4, {"const": 4}, 4),
    ("7", {"anyOf": [INTEGER, STRING]}, "7"),
    ("7", {"anyOf": [INTEGER, {"type": "boolean"}]}, 7),
    (2, {"oneOf": [STRING, NUMBER]}, 2),
    ("4", {"allOf": [INTEGER, {"minimum": 3}]}, 4),
    ([[], [[]]], TREE, [[], [[]]]),
    ({"x": 1, "z": "other"}, POINT, {"x": 1, "z": "other"}),
    ({"x": 1, "y": None}, POINT, {"x": 1}),
    ({"a": "1"}, {"type": "object", "additionalProperties": INTEGER}, {"a": 1}),
    (0.3, {"multipleOf": 0.1}, 0.3),
    ("ab", {"pattern": "^a", "minLength": 2}, "ab"),
    ("x", {"pattern": "("}, "x"),
    (1, {"type": "any", "format": "what"}, 1),
]
MISFITS: list[tuple[Any, Any, str]] = [
    (3.5, INTEGER, "is 3.5; expected integer"),
    ("3.5", INTEGER, "is '3.5'; expected integer"),
    ("1_000", INTEGER, "expected integer"),
    ("٣", INTEGER, "expected integer"),
    ("", INTEGER, "expected integer"),
    (True, INTEGER, "is True; expected integer"),
    (1, {"type": "boolean"}, "is 1; expected boolean"),
    ("yes", {"type": "boolean"}, "expected boolean"),
    ("nan", NUMBER, "expected number"),
    ("1e999", NUMBER, "expected number"),
    (1.5, STRING, "is 1.5; expected string"),
    (None, STRING, "is None; expected string"),
    (Bare("None"), STRING, "is None; expected string"),
    ([1], STRING, "expected string"),
    ("[1", {"type": "array"}, "expected array"),
    ("a", {"type": "array", "items": STRING}, "expected array"),
    (True, {"enum": [1]}, "is True; expected 1"),
    ("c", {"enum": ["a", "b"]}, "is 'c'; expected 'a' or 'b'"),
    (1, False, "is not allowed"),
    ({"y": 1}, POINT, "lacks x"),
    ({"x": "a"}, POINT, ".x is 'a'; expected number"),
    ({"x": None}, POINT, ".x is None"),
    ({"p": {"x": [0, "a"]}}, {"properties": {"p": {"properties": {"x": {"items": INTEGER}}}}},
     ".p.x[1] is 'a'; expected integer"),
    ({"b": 1}, {"properties": {"a": {}}, "additionalProperties": False}, "has no place for b"),
    (2, {"anyOf": [{"maximum": 1}, {"minimum": 3}]}, "at most 1, or is 2; expected at least 3"),
    (2, {"exclusiveMinimum": 2}, "more than 2"),
    (2, {"exclusiveMaximum": 2}, "less than 2"),
    (5, {"multipleOf": 2}, "a multiple of 2"),
    ("abc", {"maxLength": 2}, "2 characters or fewer"),
    ("abc", {"pattern": "^b"}, "a match of '^b'"),
    ([], {"minItems": 1}, "1 items or more"),
    ([1, 2], {"maxItems": 1}, "1 items or fewer"),
    (1, {"$ref": "#"}, "refer to themselves"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "schema", "expected"), FITS)
def test_fit_takes_or_reads_anew(value: Any, schema: Any, expected: Any) -> None:
    assert json.dumps(fit(value, schema)) == json.dumps(expected)


@pytest.mark.parametrize(("value", "schema", "problem"), MISFITS)
def test_fit_refuses(value: Any, schema: Any, problem: str) -> None:
    with pytest.raises(SchemaError) as error:
        fit(value, schema)
    assert problem in str(error.value)


def test_parameters_of_takes_both_forms_of_a_tool() -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": POINT}},
        {"name": "g", "parameters": POINT},
        {"name": "h"},
    ]
    assert parameters_of(tools) == {"f": POINT, "g": POINT, "h": {}}
    assert parameters_of(None) == {}
