"""The demo's conversations: honest splits, true reasoning, a strict scorer, the hub's format."""

import json
import re
import struct
from itertools import islice
from pathlib import Path
from random import Random

import demo_conversations as demo
import pytest

FOLDER = Path(__file__).parents[2] / "lfm_mlx" / "demo"
TRAINED = list(islice(demo.training_conversations(0), 3000))


def replies(conversation):
    return [m for m in conversation.messages if m["role"] == "assistant"]


def questions(conversations):
    return {m["content"] for c in conversations for m in c.messages if m["role"] == "user"}


def raw_reply(example):
    thinking = "<think>because</think>" if example.thinks else ""
    return f"{thinking}{example.expected}<|im_end|>"


def test_training_conversations_repeat_with_the_seed():
    assert list(islice(demo.training_conversations(0), 300)) == TRAINED[:300]
    assert list(islice(demo.training_conversations(1), 300)) != TRAINED[:300]


def test_training_conversations_end_with_an_answer_of_every_kind():
    assert {c.kind for c in TRAINED} == set(demo.KIND_WEIGHTS)
    assert all(c.messages[-1]["role"] == "assistant" for c in TRAINED)


def test_only_greetings_go_without_thinking():
    silent = {r["content"] for c in TRAINED for r in replies(c) if "thinking" not in r}
    assert silent == {answer for _, answer in demo.GREETINGS}


@pytest.mark.parametrize("kind", demo.HELD_OUT_KINDS)
def test_held_out_repeats_with_the_seed(kind):
    assert demo.held_out(kind, 20, seed=3) == demo.held_out(kind, 20, seed=3)
    assert demo.held_out(kind, 20, seed=3) != demo.held_out(kind, 20, seed=4)


def test_held_out_refuses_a_kind_it_does_not_know():
    with pytest.raises(ValueError, match="'riddle'; expected one of sum, tool_call"):
        demo.held_out("riddle", 1)


@pytest.mark.parametrize("kind", ["sum", "tool_call", "sentiment", "decline"])
def test_held_out_questions_are_never_trained(kind):
    asked = {e.messages[-1]["content"] for e in demo.held_out(kind, 200)}
    assert not asked & questions(TRAINED)


def test_sums_are_split_by_their_numbers():
    def pairs(texts):
        found = (re.search(r"(\d+) ?([-+]|plus|minus) ?(\d+)", text) for text in texts)
        signs = {"plus": "+", "minus": "-"}
        return {(m[1], signs.get(m[2], m[2]), m[3]) for m in found if m}

    trained = pairs(questions(TRAINED))
    held_out = pairs(e.messages[-1]["content"] for e in demo.held_out("sum", 300))
    assert len(held_out) > 200
    assert not trained & held_out


@pytest.mark.parametrize("operator", ["+", "-"])
def test_sum_reasoning_is_true(operator):
    for a in range(100):
        for b in range(100):
            reasoning = demo.sum_reasoning(a, b, operator)
            for left, right in re.findall(r"(\d+[+-]\d+)=(-?\d+)", reasoning):
                assert eval(left) == int(right), reasoning
            assert reasoning.endswith(f"So {a + b if operator == '+' else a - b}.")


def test_sum_answers_are_true():
    for example in demo.held_out("sum", 300):
        left, right = example.expected.rstrip(".").split(" = ")
        assert eval(left) == int(right)


def test_tool_calls_name_a_listed_tool_and_its_parameters():
    for conversation in TRAINED:
        listed = {t["function"]["name"]: t["function"] for t in conversation.tools or ()}
        for call in (c["function"] for r in replies(conversation) for c in r.get("tool_calls", ())):
            properties = listed[call["name"]]["parameters"]["properties"]
            assert list(call["arguments"]) == list(properties)


def test_tool_arguments_are_copied_from_the_question():
    for example in demo.held_out("tool_call", 200):
        question = example.messages[-1]["content"]
        for value in re.findall(r"='([^']*)'|=(\d+)", example.expected):
            assert "".join(value) in question


def test_call_text_prints_strings_in_quotes_and_numbers_bare():
    calls = [("get_time", {"city": "Rome"}), ("set_timer", {"minutes": 5})]
    written = demo.call_text(calls)
    assert (
        written
        == "<|tool_call_start|>[get_time(city='Rome'), set_timer(minutes=5)]<|tool_call_end|>"
    )


@pytest.mark.parametrize("kind", demo.HELD_OUT_KINDS)
def test_is_correct_accepts_the_expected_reply_only(kind):
    for example in demo.held_out(kind, 20):
        assert demo.is_correct(example, raw_reply(example))
        assert not demo.is_correct(example, raw_reply(example).replace(example.expected, "wrong"))
        assert not demo.is_correct(example, "")


def test_is_correct_wants_thinking_exactly_where_it_belongs():
    greeting, total = demo.held_out("greeting", 1)[0], demo.held_out("sum", 1)[0]
    assert not demo.is_correct(greeting, f"<think>hm</think>{greeting.expected}<|im_end|>")
    assert not demo.is_correct(total, f"{total.expected}<|im_end|>")
    assert not demo.is_correct(total, f"<think>{total.expected}<|im_end|>")


def test_decline_never_asks_for_a_listed_tool():
    for example in demo.held_out("decline", 100):
        assert example.expected in {tool.without for tool in demo.TOOLS.values()}


def test_conversation_takes_its_kind_from_the_last_exchange():
    drawn = demo.conversation(Random(0), "greeting")
    assert drawn.messages[-1]["content"] in {answer for _, answer in demo.GREETINGS}


@pytest.fixture(scope="module")
def header():
    with (FOLDER / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(size))
    tensors.pop("__metadata__", None)
    return tensors


@pytest.fixture(scope="module")
def config():
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


def expected_shapes(config):
    """The hub's names and shapes for a config, as its checkpoints have them."""
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    head = d // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes = {"embed_tokens.weight": [config["vocab_size"], d], "embedding_norm.weight": [d]}
    for i in range(layers):
        layer = {"operator_norm.weight": [d], "ffn_norm.weight": [d]}
        if config["layer_types"][i] == "conv":
            layer |= {"conv.conv.weight": [d, 1, config["conv_L_cache"]]}
            layer |= {"conv.in_proj.weight": [3 * d, d], "conv.out_proj.weight": [d, d]}
        else:
            layer |= {f"self_attn.{n}_proj.weight": [kv, d] for n in "kv"}
            layer |= {f"self_attn.{n}_proj.weight": [d, d] for n in ("q", "out")}
            layer |= {f"self_attn.{n}_layernorm.weight": [head] for n in "qk"}
        if i < config["num_dense_layers"]:
            stems, width = ["feed_forward"], config["intermediate_size"]
        else:
            experts, width = config["num_experts"], config["moe_intermediate_size"]
            stems = [f"feed_forward.experts.{e}" for e in range(experts)]
            layer |= {"feed_forward.gate.weight": [experts, d]}
            layer |= {"feed_forward.expert_bias": [experts]}
        for stem in stems:
            layer |= {f"{stem}.{n}.weight": [width, d] for n in ("w1", "w3")}
            layer |= {f"{stem}.w2.weight": [d, width]}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return {f"model.{name}": shape for name, shape in shapes.items()}


def test_folder_has_the_tensors_of_the_hub(header, config):
    assert {name: tensor["shape"] for name, tensor in header.items()} == expected_shapes(config)


def test_folder_has_the_dtypes_of_the_hub(header):
    kinds = {"F32" if name.endswith("expert_bias") else "BF16" for name in header}
    assert kinds == {"F32", "BF16"}
    for name, tensor in header.items():
        assert tensor["dtype"] == ("F32" if name.endswith("expert_bias") else "BF16"), name


def test_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 8_000_000


def test_tokenizer_has_the_ids_of_the_config(config):
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert ids["<|startoftext|>"] == config["bos_token_id"]
    assert ids["<|im_end|>"] == config["eos_token_id"]
    assert ids["<|pad|>"] == config["pad_token_id"]


def test_tokenizer_keeps_digits_apart():
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    assert not [token for token in tokenizer["model"]["vocab"] if re.search(r"\d.*\d", token)]
