"""Fits a value to a JSON Schema: coerced to the types it names, then validated by jsonschema."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jsonschema import ValidationError

from lfm_mlx.errors import InputError, one_line
from lfm_mlx.text import well_formed
from lfm_mlx.tool_calls.coerce import Coercion, SchemaError, plain, shown
from lfm_mlx.tool_calls.schema_check import Schema, validator_of

_EXPECTED = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}",
    "minLength": "{} characters or more",
    "maxLength": "{} characters or fewer",
    "pattern": "a match of {}",
    "minItems": "{} items or more",
    "maxItems": "{} items or fewer",
    "const": "{}",
}


def parameters_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Schema]:
    """Each tool's schema of its arguments, from `{"type": "function", "function": {…}}` or bare.

    Raises InputError for what is not a tool, a schema that cannot be followed, and two tools of
    one name.
    """
    found: dict[str, Schema] = {}
    if isinstance(tools, str | Mapping) or not isinstance(tools or (), Sequence):
        raise InputError(f"tools: expected a list; got {type(tools).__name__}")
    for place, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InputError(f"tools[{place}]: expected a function with a name; got {tool!r:.60}")
        name = well_formed(name)
        if name in found:
            raise InputError(f"tools[{place}] ({name}): a tool before it has the same name")
        try:
            found[name] = _parameters(function.get("parameters"))
        except SchemaError as problem:
            raise InputError(f"tools[{place}] ({name}): parameters {problem}") from None
    return found


def _parameters(given: Any) -> Schema:
    if not isinstance(given or {}, Mapping):
        raise SchemaError("are not a JSON Schema")
    return validator_of(given or {}).schema


def fit(value: Any, schema: Any) -> Any:
    """The value as the schema wants it: a value of a right type stays, another is read anew.

    Raises SchemaError.
    """
    validator = validator_of(schema)
    try:
        value = plain(Coercion(validator).coerce(value, validator.schema))
        # The nearest to the whole: that an argument is missing comes before what one of them is.
        error = min(validator.iter_errors(value), key=lambda it: len(it.path), default=None)
    except RecursionError:
        raise SchemaError("is nested too deep, or has a schema that refers to itself") from None
    if error is not None:
        raise SchemaError(_described(error))
    return value


def _described(error: ValidationError, within: bool = False) -> str:
    """The place and the fault: `.city is 3; expected string`.

    within: an error of one of several choices, whose place is told from theirs on
    """
    steps = error.relative_path if within else error.absolute_path
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    say = _SAY.get(str(error.validator), _expected)
    return one_line(ValueError(f"{path} {say(error)}"))


def _expected(error: Any) -> str:
    keyword, limit = error.validator, error.validator_value
    if keyword is None or limit is False:
        return "is not allowed"
    if keyword in _EXPECTED:
        return f"is {shown(error.instance)}; expected {_EXPECTED[keyword].format(shown(limit))}"
    return f"{shown(error.instance)}: {error.message.removeprefix(repr(error.instance)):.120}"


def _alternatives(error: Any) -> str:
    each = {at: _described(inner, True) for inner in error.context for at in [inner.schema_path[0]]}
    return ", or ".join(dict.fromkeys(each.values())) or f"fits several of {error.validator}"


def _lacking(error: Any) -> str:
    missing = [name for name in error.validator_value if name not in error.instance]
    return f"lacks {', '.join(missing)}"


def _without_place(error: Any) -> str:
    places = error.schema.get("properties", {})
    unknown = [name for name in error.instance if name not in places]
    return f"has no place for {', '.join(unknown)}; expected {', '.join(places) or 'nothing'}"


def _typed(error: Any) -> str:
    kinds = error.validator_value
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return f"is {shown(error.instance)}; expected {' or '.join(kinds)}"


_SAY: dict[str, Callable[[Any], str]] = {
    "type": _typed,
    "required": _lacking,
    "additionalProperties": lambda error: (
        _without_place(error) if error.validator_value is False else _expected(error)
    ),
    "enum": lambda error: (
        f"is {shown(error.instance)}; expected {' or '.join(map(shown, error.validator_value))}"
    ),
    "anyOf": _alternatives,
    "oneOf": _alternatives,
}
