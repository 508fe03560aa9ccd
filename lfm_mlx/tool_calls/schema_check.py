"""Schemas of strangers, made ready for validation by jsonschema, or refused with the reason.

A keyword that is null counts as absent, and so do a type that JSON does not have (`any`) and a
pattern that Python cannot read.
"""

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

import jsonschema
from jsonschema import exceptions, validators
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from lfm_mlx.errors import one_line
from lfm_mlx.text import map_text
from lfm_mlx.tool_calls.coerce import SchemaError, resolver_of

Schema = Mapping[str, Any]
# Where a schema holds further schemas: one, a list, or an object of them.
_ONE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not",
        "if", "then", "else", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_OBJECTS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Values, not keywords: null is one of them.
_VALUES = ("const", "default", "examples", "example")
_TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}
# What a schema without `$schema` may be: `items` was a list up to draft 7, `exclusiveMinimum` a
# truth value up to draft 4, which OpenAPI 3.0 kept.
_DRAFTS = (
    jsonschema.Draft202012Validator,
    jsonschema.Draft7Validator,
    jsonschema.Draft4Validator,
)


def validator_of(schema: Any) -> Any:
    """jsonschema's validator of a schema, whose `schema` is without what says nothing.

    Raises SchemaError for what is not a schema, or cannot be followed.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise SchemaError("are nested too deep") from None
    except (TypeError, ValueError) as error:
        raise SchemaError(f"are not JSON: {one_line(error)}") from None
    return _validator(text)


@lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    """The same of a schema in JSON, checked once for all calls."""
    try:
        schema: Any = _cleaned(map_text(json.loads(text)))
        declared = schema.get("$schema") if isinstance(schema, Mapping) else None
        unknown: Any = None
        known = isinstance(declared, str) and validators.validator_for(schema, default=unknown)
        drafts: Any = [known] if known else _DRAFTS
        draft = next((it for it in drafts if _holds(it, schema)), drafts[0])
        draft.check_schema(schema)
        # An empty registry: nothing is fetched from wherever a `$ref` points.
        exact = validators.extend(draft, {"multipleOf": _multiple_of})
        validator: Any = exact(schema, registry=Registry())
        for inner, resolver in _schemas(schema, resolver_of(schema)):
            if "$ref" in inner:
                resolver.lookup(inner["$ref"])
        validator.is_valid({})
    except exceptions.SchemaError as error:
        path = "".join(f".{step}" for step in error.absolute_path)
        raise SchemaError(
            f"are not a JSON Schema: {path} {one_line(ValueError(error.message)):.120}"
        ) from None
    except Unresolvable as error:
        raise SchemaError(f"have a $ref that leads nowhere: {error.ref!r:.60}") from None
    except RecursionError:
        raise SchemaError("refer to themselves without an end, or are nested too deep") from None
    return validator


def _holds(draft: Any, schema: Any) -> bool:
    """Whether the schema is one of this draft's."""
    try:
        draft.check_schema(schema)
    except exceptions.SchemaError:
        return False
    return True


def _multiple_of(_: Any, limit: Any, value: Any, __: Any) -> Iterator[exceptions.ValidationError]:
    """In decimals, as it is written: 0.3 is a multiple of 0.1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if Decimal(repr(value)) % Decimal(repr(limit)):
        yield exceptions.ValidationError("")


def _cleaned(schema: Any) -> Any:
    """The schema without keywords that say nothing."""
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {
        key: value for key, value in schema.items() if value is not None or key in _VALUES
    }
    kinds = kept.get("type")
    named = kinds if isinstance(kinds, list) else [kinds]
    if any(isinstance(kind, str) and kind not in _TYPES for kind in named):
        del kept["type"]
    if not _is_pattern(kept.get("pattern", "")):
        del kept["pattern"]
    for key in _LISTS:
        if isinstance(kept.get(key), list):
            kept[key] = list(map(_cleaned, kept[key]))
            if not kept[key]:
                del kept[key]
    for key in _OBJECTS:
        if isinstance(kept.get(key), Mapping):
            kept[key] = {
                name: {} if inner is None else _cleaned(inner)
                for name, inner in kept[key].items()
                if key != "patternProperties" or _is_pattern(name)
            }
    return kept | {key: _cleaned(kept[key]) for key in _ONE if key in kept}


def _is_pattern(pattern: Any) -> bool:
    try:
        return not isinstance(pattern, str) or bool(re.compile(pattern))
    except (re.error, OverflowError):
        return False


def _schemas(schema: Any, resolver: Any) -> Iterator[tuple[Schema, Any]]:
    """The schema and all in it, each with the resolver of its references."""
    if not isinstance(schema, Mapping):
        return
    if "$id" in schema:
        resolver = resolver.in_subresource(DRAFT202012.create_resource(schema))
    yield schema, resolver
    inner = [schema[key] for key in _ONE if key in schema]
    inner += [item for key in _LISTS if isinstance(schema.get(key), list) for item in schema[key]]
    for key in _OBJECTS:
        inner += schema[key].values() if isinstance(schema.get(key), Mapping) else ()
    for one in inner:
        yield from _schemas(one, resolver)
