"""Reasoning about sums is true, step by step."""

import re

import pytest
from sums import sum_reasoning


@pytest.mark.parametrize("operator", ["+", "-"])
def test_sum_reasoning_is_true(operator):
    for a in range(100):
        for b in range(100):
            reasoning = sum_reasoning(a, b, operator)
            for left, right in re.findall(r"(\d+[+-]\d+)=(-?\d+)", reasoning):
                assert eval(left) == int(right), reasoning
            assert reasoning.endswith(f"So {a + b if operator == '+' else a - b}.")
