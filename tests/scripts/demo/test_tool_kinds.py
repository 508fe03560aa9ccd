"""Calls are written as the model writes them."""

from tool_kinds import call_text


def test_call_text_prints_strings_in_quotes_and_numbers_bare():
    calls = [("get_time", {"city": "Rome"}), ("set_timer", {"minutes": 5})]
    written = call_text(calls)
    assert (
        written
        == "<|tool_call_start|>[get_time(city='Rome'), set_timer(minutes=5)]<|tool_call_end|>"
    )
