"""The template engine: what templates of the hub rely on, and what they may not do."""

import datetime

import jinja2
import pytest

from lfm_mlx.chatml.template import render_template


def test_tojson_keeps_characters() -> None:
    source = "{{ value | tojson }}{{ value | tojson(indent=1) }}"
    assert render_template(source, {"value": ["<é>&'"]}) == '["<é>&\'"][\n "<é>&\'"\n]'


def test_strftime_now_tells_the_day_that_is_given() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert render_template(source, {}, datetime.date(2026, 1, 2)) == "02 Jan 2026"
    assert render_template(source, {})[-4:] >= "2025"


def test_generation_is_a_block_with_its_own_names() -> None:
    source = (
        "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{{ b }}{% endgeneration %}{{ a }}"
    )
    assert render_template(source, {"b": 3}) == "231"


def test_loops_can_break_and_blocks_trim_lines() -> None:
    source = "{% for a in b %}\n  {% if a == 2 %}{% break %}{% endif %}\n{{ a }}\n{% endfor %}\n"
    assert render_template(source, {"b": [1, 2, 3]}) == "1\n"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no such role') }}",
        "{{ value.__class__.__mro__ }}",
        "{{ value.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for a in b %}",
    ],
)
def test_render_template_refuses(source: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        render_template(source, {"value": []})
