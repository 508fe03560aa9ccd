"""Saving and loading a cache: equality with what was saved, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from caches import build, draw, expect_same, fresh
from make_random_checkpoint import random_tensors
from model.test_decoder import ODD
from models import model_of

from lfm_mlx import Model
from lfm_mlx.cache.cache import cached_tokens, token_log
from lfm_mlx.cache.keys_values import KVQuantization, quantize_cache
from lfm_mlx.cache.rewind import common_length, rewind
from lfm_mlx.chatml import vocabulary_fingerprint
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.cli.command import BAD_INPUT, INTERRUPTED
from lfm_mlx.cli.entry import start
from lfm_mlx.engine import prompt_cache
from lfm_mlx.errors import InputError
from lfm_mlx.generate import program as generate
from lfm_mlx.load import load_model, load_tokenizer

WIDE = ODD | {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}


@pytest.fixture(scope="module")
def model() -> Model:
    return build("odd")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("length", [0, 1, 2, 119])
def test_a_loaded_cache_is_the_saved_one(
    model: Model, tmp_path: Path, length: int, seed: int
) -> None:
    tokens, file = draw(seed, 1, length), tmp_path / "a.cache"
    prompt_cache.save(file, fresh(model, tokens), model)
    for keep in {length, length // 2}:
        cache = prompt_cache.load(file, model)
        rewind(cache, keep)
        expect_same(model, cache, tokens[:, :keep], draw(seed + 2, 1, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_is_kept_to_the_bit(tmp_path: Path, dtype: str) -> None:
    model = model_of(ODD, random_tensors(ODD, seed=5), dtype)
    cache, file = fresh(model, draw(3, 1, 45)), tmp_path / "a.cache"
    prompt_cache.save(file, cache, model)
    following = draw(4, 1, 2)
    got = model(following, prompt_cache.load(file, model))
    assert mx.array_equal(got, model(following, cache))


def test_a_rewound_cache_can_be_saved_before_it_reads_on(model: Model, tmp_path: Path) -> None:
    tokens, file = draw(5, 1, 90), tmp_path / "a.cache"
    cache = fresh(model, tokens)
    rewind(cache, 33)
    prompt_cache.save(file, cache, model)
    expect_same(model, prompt_cache.load(file, model), tokens[:, :33], draw(6, 1, 2))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_keys_and_values(tmp_path: Path, bits: int) -> None:
    model = model_of(WIDE, random_tensors(WIDE, seed=7))
    cache, tokens, file = model.make_cache(), draw(7, 1, 70), tmp_path / "a.cache"
    quantize_cache(cache, KVQuantization.of(model.config, bits))
    model(tokens, cache)
    prompt_cache.save(file, cache, model)
    loaded = prompt_cache.load(file, model)
    assert [type(entry) for entry in loaded] == [type(entry) for entry in cache]
    for keep in (70, 31):
        rewind(loaded, keep)
        rewind(cache, keep)
        following = draw(8, 1, 1)
        assert mx.array_equal(model(following, loaded), model(following, cache))


def test_the_file_holds_what_is_used_and_no_more(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.cache"
    prompt_cache.save(file, fresh(model, draw(9, 1, 50)), model)
    needed = model.config.cache_bytes(50, 4) + 4 * 50
    assert needed < file.stat().st_size < needed + 4096
    assert file.stat().st_mode & 0o077 == 0


def test_every_altered_byte_is_noticed(model: Model, tmp_path: Path) -> None:
    file, damaged = tmp_path / "a.cache", tmp_path / "b.cache"
    prompt_cache.save(file, fresh(model, draw(10, 1, 9)), model)
    whole = file.read_bytes()
    places = np.random.default_rng(0).integers(0, len(whole), 60)
    for place in [0, 7, 8, 9, len(whole) - 1, *places.tolist()]:
        changed = bytearray(whole)
        changed[place] ^= 1
        damaged.write_bytes(changed)
        with pytest.raises(InputError, match=r"altered|not a prompt cache"):
            prompt_cache.load(damaged, model)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 500, -1])
def test_a_truncated_file_is_refused(model: Model, tmp_path: Path, length: int) -> None:
    file = tmp_path / "a.cache"
    prompt_cache.save(file, fresh(model, draw(11, 1, 9)), model)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"cut short|not a prompt cache"):
        prompt_cache.load(file, model)


def test_other_files_are_refused(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.cache"
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"a": mx.zeros(3)}, {"a": "b"})
    (tmp_path / "a.safetensors").rename(file)
    for content in (file.read_bytes(), b"hello, this is no cache", b"\x02" + bytes(7) + b"[]"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="not a prompt cache"):
            prompt_cache.load(file, model)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="cannot be read"):
            prompt_cache.load(path, model)


def test_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.cache"
    prompt_cache.save(file, fresh(model, draw(12, 1, 9)), model)
    theirs = {
        "weights": build("odd", seed=32),
        "config": model_of(ODD | {"norm_eps": 1e-3}, random_tensors(ODD, seed=31)),
    }
    for name, other in theirs.items():
        with pytest.raises(InputError, match="another model") as caught:
            prompt_cache.load(file, other)
        assert "\n" not in str(caught.value), name
    half = model_of(ODD, random_tensors(ODD, seed=31), "bfloat16")
    with pytest.raises(InputError, match="in float32, and this one is in bfloat16"):
        prompt_cache.load(file, half)


def test_another_tokenizer_is_refused(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.cache"
    prompt_cache.save(file, fresh(model, draw(13, 1, 9)), model, "ours")
    prompt_cache.load(file, model, "ours")
    prompt_cache.load(file, model)
    with pytest.raises(InputError, match="another tokenizer"):
        prompt_cache.load(file, model, "another")


def test_the_fingerprint_is_the_same_in_every_process_and_dtype() -> None:
    code = (
        "from lfm_mlx import load\n"
        "from lfm_mlx.chatml import vocabulary_fingerprint\n"
        "from lfm_mlx.engine import prompt_cache\n"
        "for dtype in ('float32', 'bfloat16', 'float16'):\n"
        "    model, tokenizer = load('demo', dtype=dtype)\n"
        "    print(prompt_cache.fingerprint(model),"
        " vocabulary_fingerprint(tokenizer))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    model, tokenizer = load_model(DEMO_FOLDER), load_tokenizer(DEMO_FOLDER)
    own = prompt_cache.fingerprint(model), vocabulary_fingerprint(tokenizer)
    assert {tuple(line.split()) for line in done.stdout.splitlines()} == {own}


def test_what_cannot_be_saved(model: Model, tmp_path: Path) -> None:
    batch = model.make_cache([0, 2])
    model(draw(14, 2, 5), batch)
    with pytest.raises(InputError, match="one conversation"):
        prompt_cache.save(tmp_path / "a", batch, model)
    cache = model.make_cache()
    model(draw(15, 1, 5), cache, input_embeddings=model.model.embed_tokens(draw(15, 1, 5)))
    with pytest.raises(InputError, match="does not know the ids"):
        prompt_cache.save(tmp_path / "a", cache, model)
    with pytest.raises(InputError, match="cannot be written"):
        prompt_cache.save(tmp_path / "absent" / "a", fresh(model, draw(16, 1, 2)), model)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_the_old_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.cache"
    prompt_cache.save(file, fresh(model, draw(17, 1, 9)), model)
    before = file.read_bytes()

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prompt_cache.save(file, fresh(model, draw(18, 1, 30)), model)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("prompt", "kept"), [([1, 2, 3], 2), ([1, 2, 9, 9], 2), ([7], 0), ([8, 1], 0), ([], 0),
                         ([1, 2, 3, 4, 5], 3)],
)  # fmt: skip
def test_common_tokens_leave_one_to_read(model: Model, prompt: list[int], kept: int) -> None:
    cache = fresh(model, mx.array([[1, 2, 3]]))
    assert common_length(cache, prompt) == kept
    assert cached_tokens(cache) == 3


LONG = "Please note: " + "the sum of 12 and 13 is 25. " * 12
ASKED = ["--model", "demo", "--temp", "0", "--max-tokens", "24", "--json"]


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, dict]:
    assert generate.main([*ASKED, *argv]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return "".join(event.get("text", "") for event in events), events[-1]


@pytest.mark.parametrize("kv", [[], ["--kv-bits", "8"]])
def test_generate_reads_only_what_is_new(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kv: list[str]
) -> None:
    file = tmp_path / "a.cache"
    questions = [LONG + "What is 27 + 58?", LONG + "What is 31 + 44?", LONG + "What is 27 + 58?"]
    for number, question in enumerate(questions):
        plain, _ = answer(capsys, "--prompt", question, *kv)
        text, end = answer(capsys, "--prompt", question, "--prompt-cache", str(file), *kv)
        assert text == plain
        shared = end["reused_tokens"] / end["prompt_tokens"]
        assert shared == 0 if number == 0 else shared > 0.8
    cache = prompt_cache.load(
        file, load_model(DEMO_FOLDER), vocabulary_fingerprint(load_tokenizer(DEMO_FOLDER))
    )
    log = token_log(cache)
    assert log is not None
    assert end["prompt_tokens"] < log.length <= end["prompt_tokens"] + end["generated_tokens"]


def test_the_prompt_that_was_not_read_again_counts_for_the_repetition_penalty(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ["--prompt", LONG, "--raw", "--repetition-penalty", "1.5"]
    plain, _ = answer(capsys, *asked)
    for _ in range(2):
        text, _ = answer(capsys, *asked, "--prompt-cache", str(tmp_path / "a"))
        assert text == plain


def test_generate_refuses_a_cache_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.cache"
    answer(capsys, "--prompt", "a", "--prompt-cache", str(file), "--kv-bits", "8")
    refused = {
        "8 bits": ["--kv-bits", "4", "--prompt-cache", str(file)],
        "expected 64 or 32": ["--kv-bits", "8", "--kv-group-size", "48"],
        "in float32": ["--dtype", "bfloat16", "--prompt-cache", str(file)],
        "cannot be written": ["--prompt-cache", str(tmp_path / "absent" / "a")],
        "--kv-bits": ["--kv-start", "5"],
    }
    for says, argv in refused.items():
        monkeypatch.setattr(sys, "argv", ["generate", *ASKED, "--prompt", "a", *argv])
        assert start("generate") == BAD_INPUT
        out, err = capsys.readouterr()
        assert says in err
        assert err.count("\n") == 1
        assert "generated_tokens" not in out


def test_an_interrupted_answer_keeps_what_was_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.cache"
    model = load_model(DEMO_FOLDER)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.Printer, "segment", interrupt)
    asked = [*ASKED, "--prompt", LONG, "--prompt-cache", str(file)]
    assert generate.main(asked) == INTERRUPTED
    monkeypatch.undo()
    capsys.readouterr()
    cache = prompt_cache.load(file, model)
    log = token_log(cache)
    assert log is not None
    assert log.tokens is not None
    assert log.length > 100
    expect_like_fresh(model, cache, log.tokens)


def expect_like_fresh(model: Model, cache: list, tokens: mx.array) -> None:
    following = mx.array([[7]])
    got, wanted = model(following, cache), model(following, fresh(model, tokens))
    assert mx.allclose(got, wanted, rtol=1e-4, atol=1e-4)
