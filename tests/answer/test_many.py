"""Questions answered together: each gets the answer that it gets alone, and fails alone."""

from typing import Any

import pytest

from lfm_mlx import Model
from lfm_mlx.answer.control import Control
from lfm_mlx.answer.many import answer_many
from lfm_mlx.answer.question import Question, ask
from lfm_mlx.answer.responder import Responder
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.engine.sample import GREEDY, Sampling
from lfm_mlx.load import load_model, load_tokenizer

TEXTS = ["What is 27 + 58?", "Hello", "What is 3 + 4?", "Is this good or bad: I love it", "Thanks"]
DAY = "2026-01-02"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DEMO_FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO_FOLDER)


def question(model: Model, tokenizer: Any, text: str, **asked: Any) -> Question:
    messages = [{"role": "user", "content": text}]
    return ask(tokenizer, model.config, messages, max_tokens=40, date=DAY, **asked)


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(temperature=0, repetition_penalty=1.3), Sampling(temperature=1.5, top_k=5)],
    ids=["greedy", "penalized", "drawn"],
)
def test_each_gets_the_answer_that_it_gets_alone(
    model: Model, tokenizer: Any, size: int, sampling: Sampling
) -> None:
    asked = [(text, question(model, tokenizer, text)) for text in TEXTS]
    found = {
        one.key: one for one in answer_many(model, tokenizer, asked, sampling, seed=7, size=size)
    }
    assert found.keys() == set(TEXTS)
    for text in TEXTS:
        alone = Responder(model, tokenizer, sampling, seed=7)
        segments = list(alone.answer_question(question(model, tokenizer, text)))
        assert found[text].segments == segments
        assert found[text].finish_reason == alone.statistics.finish_reason
        assert found[text].generated_tokens == alone.statistics.generated_tokens
        assert found[text].prompt_tokens == alone.statistics.prompt_tokens


def test_constraints_are_followed_each_by_its_own_question(model: Model, tokenizer: Any) -> None:
    choices = {"Hello": ("yes", "no"), "Thanks": ("red", "green", "blue")}
    asked = [
        (text, question(model, tokenizer, text, control=Control(choices=words)))
        for text, words in choices.items()
    ]
    for one in answer_many(model, tokenizer, asked, GREEDY, size=4):
        text = "".join(segment.text for segment in one.segments if segment.kind == "text")
        assert text in choices[one.key]


def test_one_that_fails_ends_alone(model: Model, tokenizer: Any) -> None:
    class Broken:
        def allowed(self) -> None:
            raise RuntimeError("out of order")

        def advance(self, token: int) -> None:
            """Never reached."""

    good, bad = (question(model, tokenizer, "What is 3 + 4?") for _ in range(2))
    broken: Any = Broken()
    bad = Question(bad.prompt, bad.max_tokens, bad.control, broken)
    found = {one.key: one for one in answer_many(
        model, tokenizer, [("good", good), ("bad", bad)], GREEDY, size=2
    )}  # fmt: skip
    assert found["bad"].error == "RuntimeError: out of order"
    assert (found["good"].error, found["good"].finish_reason) == (None, "stop")


def test_a_model_that_computes_nan_says_so(tokenizer: Any) -> None:
    broken = load_model(DEMO_FOLDER)
    broken.model.embedding_norm.weight = broken.model.embedding_norm.weight * float("nan")
    asked = [(text, question(broken, tokenizer, text)) for text in TEXTS[:2]]
    found = list(answer_many(broken, tokenizer, asked, GREEDY, size=2))
    assert [one.generated_tokens for one in found] == [0, 0]
    assert all(one.error is not None and "computes NaN" in one.error for one in found)
