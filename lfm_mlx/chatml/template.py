"""A chat template of the hub, rendered in a sandbox: templates are programs of strangers.

What templates may rely on is there: `tojson` that keeps every character, `raise_exception`,
`strftime_now`, `{% generation %}`, `{% break %}`.
"""

import json
from collections.abc import Callable, Mapping
from datetime import date, datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_template(source: str, variables: Mapping[str, Any], today: date | None = None) -> str:
    """The template's text.

    today: the day that `strftime_now` tells; by default the clock's

    Raises jinja2.TemplateError, or whatever the template's operations raise.
    """
    clock: Callable[[str], str] = today.strftime if today else _strftime_now
    return _compiled(source).render({"strftime_now": clock, **variables})


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


class _Generation(ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """JSON as the hub has it: jinja2's own filter would escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
