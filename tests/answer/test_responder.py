"""Answers of one Responder: at temperature 0 a choice is the likeliest one."""

import pytest

from lfm_mlx import Model, chatml
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.question import ask
from lfm_mlx.answer.responder import Responder
from lfm_mlx.cache.keys_values import KVQuantization
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.engine.sample import Sampling
from lfm_mlx.errors import InputError
from lfm_mlx.load import load_model, load_tokenizer

TOKENIZER = load_tokenizer(DEMO_FOLDER)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DEMO_FOLDER, dtype="float32")


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(
    "choices", [("a", "b"), ("yes", "no"), ("no", "none", "nothing"), ("12", "1", "120"), ("x",)]
)
@pytest.mark.parametrize("prompt", ["hi", "What is 7 + 5?"])
def test_the_choice_is_the_likeliest(
    model: Model, prompt: str, choices: tuple[str, ...], budget: int | None
) -> None:
    responder = Responder(model, TOKENIZER, Sampling(temperature=0.0))
    question = ask(
        TOKENIZER, model.config, [{"role": "user", "content": prompt}],
        control=Control(budget, choices=choices),
    )  # fmt: skip
    said = chatml.as_message(list(responder.answer_question(question)))["content"]
    scores = dict(zip(choices, responder.score_choices(question), strict=True))
    assert said in choices
    assert scores[said] == max(scores.values())


def test_a_choice_that_is_cut_short_stays_what_was_drawn(model: Model) -> None:
    responder = Responder(model, TOKENIZER, Sampling(temperature=0.0))
    question = ask(
        TOKENIZER, model.config, [{"role": "user", "content": "hi"}],
        control=Control(0, choices=("some long answer", "some long words")), max_tokens=3,
    )  # fmt: skip
    said = chatml.as_message(list(responder.answer_question(question)))["content"]
    assert responder.statistics.finish_reason == "length"
    assert said not in question.control.choices
    assert any(choice.startswith(said) for choice in question.control.choices)


def test_what_cannot_be_answered_is_said_before_the_first_piece(model: Model) -> None:
    messages = [{"role": "user", "content": "hi"}]
    drafting = Responder(model, TOKENIZER, longest_draft=4)
    constrained = ask(TOKENIZER, model.config, messages, control=Control(choices=("a", "b")))
    with pytest.raises(InputError, match="drafts free text"):
        drafting.answer_question(constrained)
    cache = model.make_cache()
    list(Responder(model, TOKENIZER, cache=cache, max_tokens=2,
                   kv_quantization=KVQuantization(8, 32)).answer(messages))  # fmt: skip
    other = Responder(model, TOKENIZER, cache=cache, kv_quantization=KVQuantization(4, 32))
    with pytest.raises(InputError, match="in 8 bits, groups of 32; asked for 4 bits"):
        other.answer(messages)
