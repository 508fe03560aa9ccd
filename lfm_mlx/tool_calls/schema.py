"""Fits a value to a JSON Schema: types and limits hold, or SchemaError says what does not.

Keywords that only annotate (format, title, default, …) have no effect.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lfm_mlx.errors import InputError
from lfm_mlx.tool_calls.coerce import SchemaError, as_type, plain, shown

Schema = Mapping[str, Any]
# Keyword: the types it speaks of, whether value and limit agree, and the limit in words.
Limit = tuple[type | tuple[type, ...], Callable[[Any, Any], bool], str]
_NUMBERS = (int, float)
_LIMITS: dict[str, Limit] = {
    "minimum": (_NUMBERS, lambda value, limit: value >= limit, "at least {}"),
    "maximum": (_NUMBERS, lambda value, limit: value <= limit, "at most {}"),
    "exclusiveMinimum": (_NUMBERS, lambda value, limit: value > limit, "more than {}"),
    "exclusiveMaximum": (_NUMBERS, lambda value, limit: value < limit, "less than {}"),
    "multipleOf": (_NUMBERS, lambda value, limit: _is_multiple(value, limit), "a multiple of {}"),
    "minLength": (str, lambda value, limit: len(value) >= limit, "{} characters or more"),
    "maxLength": (str, lambda value, limit: len(value) <= limit, "{} characters or fewer"),
    "pattern": (str, lambda value, limit: bool(re.search(limit, value)), "a match of {}"),
    "minItems": (list, lambda value, limit: len(value) >= limit, "{} items or more"),
    "maxItems": (list, lambda value, limit: len(value) <= limit, "{} items or fewer"),
}


def parameters_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Schema]:
    """Each tool's schema of its arguments, from `{"type": "function", "function": {…}}` or bare.

    Raises InputError.
    """
    found: dict[str, Schema] = {}
    for place, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InputError(f"tools[{place}]: expected a function with a name; got {tool!r:.60}")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise InputError(f"tools[{place}] ({name}): parameters are not a JSON Schema")
        found[name] = parameters
    return found


def fit(value: Any, schema: Any) -> Any:
    """The value as the schema wants it: a value of a right type stays, another is read anew.

    Raises SchemaError.
    """
    return _fit(value, schema, schema if isinstance(schema, Mapping) else {}, coerce=True)


def _fit(value: Any, schema: Any, root: Schema, coerce: bool) -> Any:
    schema = _referred(schema, root)
    if schema is False:
        raise SchemaError("is not allowed")
    if not isinstance(schema, Mapping):
        return plain(value)
    for part in schema.get("allOf", ()):
        value = _fit(value, part, root, coerce)
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        value = _first_fit(value, choices, root, coerce) if choices else value
    kinds = schema.get("type")
    if kinds:
        value = as_type(value, [kinds] if isinstance(kinds, str) else kinds, coerce)
    value = _as_listed(value, schema, coerce)
    if isinstance(value, dict):
        value = _fit_object(value, schema, root, coerce)
    elif isinstance(value, list):
        items = schema.get("items", True)
        value = [_within(f"[{at}]", item, items, root, coerce) for at, item in enumerate(value)]
    _check_limits(value, schema)
    return value


def _referred(schema: Any, root: Schema) -> Any:
    """The schema that a `$ref` within `root` leads to."""
    seen: list[Any] = []
    while isinstance(schema, Mapping) and str(schema.get("$ref", "")).startswith("#"):
        if schema in seen:
            raise SchemaError(f"has a schema that refers to itself, {schema['$ref']}")
        seen.append(schema)
        steps = [step for step in schema["$ref"][1:].split("/") if step]
        schema = root
        for step in steps:
            name = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name, True) if isinstance(schema, Mapping) else True
    return schema


def _first_fit(value: Any, choices: Sequence[Any], root: Schema, coerce: bool) -> Any:
    """The value as the first choice that takes it unchanged, else as the first that takes it."""
    problems: list[str] = []
    for again in (False, True) if coerce else (False,):
        for choice in choices:
            try:
                return _fit(value, choice, root, again)
            except SchemaError as misfit:
                problems.append(str(misfit))
    raise SchemaError(", or ".join(dict.fromkeys(problems)))


def _as_listed(value: Any, schema: Schema, coerce: bool) -> Any:
    """The value that `const` or `enum` lists."""
    if "const" not in schema and "enum" not in schema:
        return plain(value)
    listed = [schema["const"]] if "const" in schema else list(schema["enum"])
    if any(_is_same(plain(value), option) for option in listed):
        return plain(value)
    spelled = [option for option in listed if coerce and str(option) == str(value)]
    if len(spelled) == 1:
        return spelled[0]
    raise SchemaError(f"is {shown(value)}; expected {' or '.join(map(shown, listed))}")


def _is_same(value: Any, option: Any) -> bool:
    """Equality as JSON has it: true is not 1."""
    return value == option and isinstance(value, bool) == isinstance(option, bool)


def _fit_object(value: dict[str, Any], schema: Schema, root: Schema, coerce: bool) -> Any:
    required = schema.get("required", ())
    missing = [name for name in required if name not in value]
    if missing:
        raise SchemaError(f"lacks {', '.join(missing)}")
    properties = schema.get("properties") or {}
    others = schema.get("additionalProperties", True)
    unknown = [name for name in value if name not in properties]
    if unknown and others is False:
        raise SchemaError(
            f"has no place for {', '.join(unknown)}; expected {', '.join(properties)}"
        )
    fitted: dict[str, Any] = {}
    for name, item in value.items():
        try:
            fitted[name] = _within(f".{name}", item, properties.get(name, others), root, coerce)
        except SchemaError:
            # Models write `unit=None` to leave out what they may leave out.
            if plain(item) is not None or name in required:
                raise
    return fitted


def _within(name: str, value: Any, schema: Any, root: Schema, coerce: bool) -> Any:
    try:
        return _fit(value, schema, root, coerce)
    except SchemaError as misfit:
        inner = str(misfit)
        raise SchemaError(f"{name}{inner}" if inner[0] in ".[" else f"{name} {inner}") from None


def _check_limits(value: Any, schema: Schema) -> None:
    for keyword, (types, holds, words) in _LIMITS.items():
        limit = schema.get(keyword)
        if limit is None or isinstance(value, bool) or not isinstance(value, types):
            continue
        try:
            held = holds(value, limit)
        except (re.error, TypeError):  # a limit that means nothing in Python limits nothing
            continue
        if not held:
            raise SchemaError(f"is {shown(value)}; expected {words.format(shown(limit))}")


def _is_multiple(value: float, limit: float) -> bool:
    times = value / limit if limit else 0.5
    return abs(times - round(times)) < 1e-9
