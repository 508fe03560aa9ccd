"""A value as the JSON type that is asked for: as it is, or the one it spells ("3" → 3).

Nothing is guessed: a fraction never becomes an integer, and a number that was read already never
becomes text where its spelling (`1.10`) would be lost. What has no reading stays as it is, for the
validation to refuse.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from lfm_mlx.tool_calls.literals import NUMBER, WORDS, Bare, ParseError, read_value, skip_space

_TYPES = {"number": (int, float), "string": str, "array": list, "object": dict}


class SchemaError(ValueError):
    """A value that the schema does not allow, or a schema that cannot be followed."""


class Coercion:
    """Coerces values to a validator's schema, and to the schemas in it."""

    def __init__(self, validator: Any):
        self._validator = validator
        self._resolver = resolver_of(validator.schema)

    def _referred(self, ref: str) -> Any:
        """The schema that a `$ref` leads to; True, which says nothing, below another `$id`."""
        try:
            return self._resolver.lookup(ref).contents
        except Unresolvable:
            return True

    def coerce(self, value: Any, schema: Any) -> Any:
        """The value, read anew where it then fits the schema; a Bare if nothing says its type."""
        if not isinstance(schema, Mapping):
            return value
        if "$ref" in schema:
            value = self.coerce(value, self._referred(schema["$ref"]))
        for part in schema.get("allOf", ()):
            value = self.coerce(value, part)
        for key in ("anyOf", "oneOf"):
            value = self._chosen(value, schema[key]) if key in schema else value
        if "type" in schema:
            kinds = schema["type"]
            value = as_type(value, [kinds] if isinstance(kinds, str) else kinds)
        value = self._listed(value, schema)
        if isinstance(value, dict):
            return self._object(value, schema)
        return self._array(value, schema) if isinstance(value, list) else value

    def _fits(self, value: Any, schema: Any) -> bool:
        return self._validator.evolve(schema=schema).is_valid(value)

    def _chosen(self, value: Any, choices: Sequence[Any]) -> Any:
        """The value by the first choice that takes it unchanged, else by the first that takes it.

        A choice between a bare word's reading and its text is the schema's to make.
        """
        fitting = [choice for choice in choices if self._fits(plain(value), choice)]
        for choice in [*fitting, *choices]:
            coerced = self.coerce(value, choice)
            if self._fits(coerced, choice):
                return coerced
        return value

    def _listed(self, value: Any, schema: Mapping[str, Any]) -> Any:
        """The value that `const` or `enum` lists, if one is spelled so."""
        keys = [key for key in ("const", "enum") if key in schema]
        if not keys:
            return value
        exact = plain(value)
        if self._fits(exact, {key: schema[key] for key in keys}):
            return exact
        listed = [schema["const"]] if "const" in schema else schema["enum"]
        spelled = [option for option in listed if str(option) == str(value)]
        return spelled[0] if len(spelled) == 1 else exact

    def _object(self, value: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        patterns = schema.get("patternProperties", {})
        coerced: dict[str, Any] = {}
        for name, item in value.items():
            parts = [properties[name]] if name in properties else []
            parts += [patterns[it] for it in patterns if re.search(it, name)]
            for part in parts or [schema.get("additionalProperties", True)]:
                item = self.coerce(item, part)
            # Models write `unit=None` to leave out what they may leave out.
            left_out = plain(item) is None and name in properties and name not in required
            if isinstance(item, Bare) and not item.is_finite():
                raise SchemaError(f".{name} is {item}, which is not a value of JSON")
            if not left_out or self._fits(None, properties[name]):
                coerced[name] = plain(item)
        return coerced

    def _array(self, value: list[Any], schema: Mapping[str, Any]) -> list[Any]:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list):  # as it was up to draft 2019-09
            first, rest = rest, schema.get("additionalItems", True)
        parts = [*first, *([rest] * (len(value) - len(first)))]
        return [self.coerce(item, part) for item, part in zip(value, parts, strict=False)]


def resolver_of(schema: Any) -> Any:
    """referencing's resolver of the references within a schema; it fetches nothing."""
    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    return Registry().resolver_with_root(root)


def as_type(value: Any, kinds: Sequence[str]) -> Any:
    """The value as the first of these JSON types that it is, or else spells; or as it is."""
    exact = plain(value)
    for kind in kinds:
        if is_a(exact, kind):
            return int(exact) if kind == "integer" else exact
    for kind in kinds:
        try:
            return _READERS[kind](value)
        except ParseError:
            continue
    return exact


def plain(value: Any) -> Any:
    """The value itself; a bare word becomes what it spells."""
    return value.value() if isinstance(value, Bare) else value


def shown(value: Any) -> str:
    """The value in an error line, cut where it is long."""
    text = repr(plain(value))
    return text if len(text) <= 60 else f"{text[:57]}…"


def is_a(value: Any, kind: str) -> bool:
    """Whether a plain value is of this JSON type; 3.0 is an integer, true is not a number."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, _TYPES.get(kind, ()))


def _number(value: Any) -> int | float:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        number = Bare(value).value()
        if isinstance(number, int | float):
            return number
    raise ParseError("not a number")


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ParseError("not an integer")
    return int(number)


def _word(value: Any, kind: str) -> bool | None:
    if isinstance(value, str) and value in WORDS and is_a(WORDS[value], kind):
        return WORDS[value]
    raise ParseError(f"not {kind}")


def _string(value: Any) -> str:
    spelled = isinstance(value, str) or (is_a(value, "integer") and isinstance(value, int))
    if not spelled or plain(value) is None:
        raise ParseError("not a string")
    return str(value)


def _container(value: Any, kind: str) -> Any:
    if isinstance(value, str):
        found, end = read_value(value, 0)
        if skip_space(value, end) == len(value) and is_a(found, kind):
            return found
    raise ParseError(f"not {kind}")


_READERS: dict[str, Callable[[Any], Any]] = {
    "integer": _integer,
    "number": _number,
    "string": _string,
    "boolean": lambda value: _word(value, "boolean"),
    "null": lambda value: _word(value, "null"),
    "array": lambda value: _container(value, "array"),
    "object": lambda value: _container(value, "object"),
}
