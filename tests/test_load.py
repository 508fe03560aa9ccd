"""Loading: every spelling of a folder gives mlx-lm's logits, and a bad folder one clear line."""

import json
import logging
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from damage import DAMAGES, NORM, POINTER
from folders import (
    DENSE,
    FAMILIES,
    SPARSE,
    TOKENS,
    change_config,
    change_tensors,
    command,
    contents,
    our_logits,
    stock_logits,
    stored_tensors,
    write_folder,
)
from make_random_checkpoint import random_tensors
from mlx.utils import tree_flatten
from mlx_lm import utils
from reference import TRANSFORMERS5_FOLDERS, relative_error, transformers5_answer

import lfm_mlx
from lfm_mlx import device
from lfm_mlx import load as load_function
from lfm_mlx.checkpoint.folder import INDEX_FILE, Checkpoint
from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.cli.command import BAD_INPUT
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError
from lfm_mlx.load import as_dtype, load_model, load_tokenizer, loaded_bytes, stop_ids, stored_as_is

EXACT = 2e-6  # of the largest logit: the same float32 sums in another order


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["hub", "mlx"])
@pytest.mark.parametrize("seed", [1, 2])
def test_logits_are_those_of_mlx_lm(tmp_path: Path, family: str, layout: str, seed: int) -> None:
    hub = write_folder(tmp_path / "hub", FAMILIES[family], seed=seed)
    folder = write_folder(tmp_path / "model", FAMILIES[family], seed=seed, layout=layout)
    assert relative_error(our_logits(folder), stock_logits(hub)) < EXACT


def test_fused_experts(tmp_path: Path) -> None:
    """mlx-lm cannot read them; the hub's spelling of the same weights is the judge."""
    hub = write_folder(tmp_path / "hub", seed=4)
    fused = write_folder(tmp_path / "fused", seed=4, layout="fused")
    assert relative_error(our_logits(fused), stock_logits(hub)) < EXACT


@pytest.mark.parametrize("spelling", TRANSFORMERS5_FOLDERS)
def test_folder_saved_by_transformers_5(spelling: str) -> None:
    tokens, logits = transformers5_answer()
    model = load_model(TRANSFORMERS5_FOLDERS[spelling], dtype="float32")
    assert relative_error(np.array(model(mx.array(tokens)[None])[0]), logits) < 1e-5


def test_untied_head(tmp_path: Path) -> None:
    """mlx-lm has no untied head. With the embedding's own values it must change nothing."""
    tied = write_folder(tmp_path / "tied")
    untied = write_folder(tmp_path / "untied", SPARSE | {"tie_word_embeddings": False})
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(our_logits(untied), our_logits(tied), rtol=0.1)
    change_tensors(untied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    np.testing.assert_array_equal(our_logits(untied), our_logits(tied))


def stock_conversion(
    source: Path, out: Path, bits: int = 4, group: int = 64, mode: str = "affine",
    predicate: Callable[..., Any] | None = None,
) -> Path:  # fmt: skip
    """What `mlx_lm.convert -q` makes of `source`, without its tokenizer."""
    model, config = utils.load_model(source, lazy=True)
    model, config = utils.quantize_model(
        model, config, group, bits, mode=mode, quant_predicate=predicate
    )
    utils.save_model(out, model)
    utils.save_config(config, out / "config.json")
    return out


EMBED = "model.embed_tokens"


def six_bit_embedding_float_gate(path: str, _: object) -> bool | dict[str, Any]:
    if path.endswith("feed_forward.gate"):
        return False
    return {"bits": 6, "group_size": 32} if "embed_tokens" in path else True


def mixed(path: str, _: object) -> bool | dict[str, Any]:
    """Unequal bits in one layer, a matrix left floating, and a mode of its own."""
    if path.endswith(("q_proj", "feed_forward.gate")):
        return False
    if path.endswith(("down_proj", ".w2")):
        return {"bits": 8, "group_size": 128, "mode": "affine"}
    if path.endswith(("up_proj", ".w3")):
        return {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("predicate", [None, six_bit_embedding_float_gate, mixed])
@pytest.mark.parametrize("bits", [3, 4])
def test_published_conversions(
    tmp_path: Path, family: str, predicate: Callable[..., Any] | None, bits: int
) -> None:
    source = write_folder(tmp_path / "hub", FAMILIES[family], seed=bits)
    folder = stock_conversion(source, tmp_path / "mlx", bits, predicate=predicate)
    assert relative_error(our_logits(folder), stock_logits(folder)) < EXACT
    assert relative_error(our_logits(folder), our_logits(source)) > 1e-3
    gates = {name for name in stored_tensors(folder) if name.endswith("feed_forward.gate.scales")}
    assert len(gates) == (3 if family == "sparse" and predicate is None else 0)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_published_conversions_of_other_modes(tmp_path: Path, mode: str) -> None:
    source = write_folder(tmp_path / "hub")
    bits, group = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}[mode]
    # mlx-lm gives the gate 8 bits and the mode of the rest, which not every mode allows
    folder = stock_conversion(
        source, tmp_path / "mlx", bits, group, mode, lambda path, _: not path.endswith(".gate")
    )
    assert relative_error(our_logits(folder), stock_logits(folder)) < EXACT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantized", [False, True])
def test_dtype_of_the_parameters(tmp_path: Path, dtype: str, quantized: bool) -> None:
    folder = write_folder(tmp_path / "hub")
    if quantized:
        folder = stock_conversion(folder, tmp_path / "mlx")
    model = load_model(folder, dtype=dtype)
    for name, array in tree_flatten(model.parameters()):
        packed = quantized and name.endswith(".weight") and array.dtype == mx.uint32
        expected = mx.float32 if name.endswith("expert_bias") else getattr(mx, dtype)
        assert packed or array.dtype == expected, name
    assert load_model(folder, dtype=getattr(mx, dtype))(mx.array(TOKENS)).dtype == getattr(
        mx, dtype
    )


def test_values_are_the_stored_ones(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hub", seed=5)
    parameters = dict(tree_flatten(load_model(folder, dtype="bfloat16").parameters()))
    values = random_tensors(SPARSE, 5)
    name = "model.layers.3.feed_forward.experts.4.w2.weight"
    stack = parameters["model.layers.3.feed_forward.switch_mlp.down_proj.weight"]
    assert mx.array_equal(stack[4], mx.array(values[name]).astype(mx.bfloat16))
    bias = "model.layers.2.feed_forward.expert_bias"
    np.testing.assert_array_equal(np.array(parameters[bias]), values[bias])


def test_cpu_computes_in_float32_by_default() -> None:
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert as_dtype(None) == (mx.float32 if on_cpu else None)
    assert as_dtype("float16") == mx.float16
    assert as_dtype(mx.bfloat16) == mx.bfloat16


@pytest.mark.parametrize("quantized", [False, True])
def test_gpu_keeps_the_dtypes_of_the_checkpoint(
    tmp_path: Path, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("lfm_mlx.load"), "as_dtype", lambda dtype: dtype)
    folder = write_folder(tmp_path / "hub")
    if quantized:
        folder = stock_conversion(folder, tmp_path / "mlx")
    stored = {array.dtype for array in stored_tensors(folder).values()}
    found = {array.dtype for _, array in tree_flatten(load_model(folder).parameters())}
    assert found == stored == {mx.bfloat16, mx.float32} | ({mx.uint32} if quantized else set())


@pytest.mark.parametrize("dtype", ["int8", "F16", mx.int32, mx.complex64, 16])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(InputError, match="supported: float32, bfloat16, float16"):
        as_dtype(dtype)


# --- weights too many for the memory in float32 ---


@pytest.mark.parametrize("layout", ["hub", "fused", "mlx"])
def test_experts_keep_their_dtype_when_memory_is_short(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "model", layout=layout)
    expected = our_logits(folder)
    config, tensors = Config.from_dict(SPARSE), Checkpoint(folder).tensors
    roomy = loaded_bytes(config, tensors, mx.float32)
    assert not stored_as_is(config, tensors, mx.float32)
    monkeypatch.setattr(device, "device_bytes", lambda: int(1.9 * roomy))
    assert stored_as_is(config, tensors, mx.float32)
    assert not stored_as_is(config, tensors, mx.bfloat16)
    model = load_model(folder, dtype="float32")
    parameters = dict(tree_flatten(model.parameters()))
    for name, array in parameters.items():
        assert array.dtype == (mx.bfloat16 if ".switch_mlp." in name else mx.float32), name
    assert loaded_bytes(config, tensors, mx.float32) == sum(a.nbytes for a in parameters.values())
    assert relative_error(np.array(model(mx.array(TOKENS))), expected) < EXACT


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, None])
@pytest.mark.parametrize("quantized", [False, True])
def test_loaded_bytes_is_what_the_parameters_take(
    tmp_path: Path, dtype: mx.Dtype | None, quantized: bool
) -> None:
    folder = write_folder(tmp_path / "hub")
    if quantized:
        folder = stock_conversion(folder, tmp_path / "mlx")
    checkpoint = Checkpoint(folder)
    found = loaded_bytes(Config.from_dict(checkpoint.config), checkpoint.tensors, dtype)
    model = load_model(folder, dtype=dtype or mx.bfloat16)
    taken = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    # the few expert biases stay in float32
    assert taken - found == (3 * 5 * 2 if dtype is not None and dtype.size == 2 else 0)


# --- what is wrong with a folder ---


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model")
    DAMAGES[name].apply(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    message = one_line(caught)
    assert DAMAGES[name].said in message
    assert len(message) < 1000
    if name != "config of a larger model":
        assert str(folder) in message or "config.json" in message


@pytest.mark.parametrize("name", ["config cut off", "shard is a git-lfs pointer", "tensor missing"])
def test_generate_ends_with_one_line_and_code_2(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model")
    DAMAGES[name].apply(folder)
    before = contents(tmp_path)
    done = command("generate", "--model", folder, "--raw", "--prompt", "a")
    assert done.returncode == BAD_INPUT, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert DAMAGES[name].said in done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_names_bad_weights(tmp_path: Path, value: float) -> None:
    folder = write_folder(tmp_path / "model")
    load_model(folder, check=True)
    name = "model.layers.2.feed_forward.experts.3.w1.weight"

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][3, 5] = value
        tensors[NORM][0] = value

    change_tensors(folder, spoil)
    load_model(folder)
    with pytest.raises(InputError) as caught:
        load_model(folder, check=True)
    assert one_line(caught) == (
        "weights with NaN or infinity: model.layers.2.feed_forward.switch_mlp.gate_proj.weight, "
        f"{NORM}; download or convert them again"
    )


@pytest.mark.parametrize("missing", ["scales", "biases", "weight"])
def test_quantized_folder_with_parts_missing(tmp_path: Path, missing: str) -> None:
    folder = stock_conversion(write_folder(tmp_path / "hub"), tmp_path / "mlx")
    name = f"model.layers.2.feed_forward.switch_mlp.up_proj.{missing}"
    tensors = stored_tensors(folder)
    del tensors[name]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert name.rsplit(".", 1)[0] in one_line(caught)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 4, "group_size": 64, "mode": "nf4"}, "mode is 'nf4'; supported: affine"),
        ({"bits": 7, "group_size": 64}, "bits is 7"),
        ({EMBED: {"bits": 8, "group_size": 64}}, "shape (131, 16), expected (131, 32)"),
        (
            {EMBED: {"bits": 4, "group_size": 32}},
            "embed_tokens.biases: shape (131, 2), expected (131, 4)",
        ),
        ({"bits": 4}, "quantization is {'bits': 4}; supported: MLX's bits and group_size"),
    ],
)
def test_quantization_settings_that_do_not_fit(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    folder = stock_conversion(write_folder(tmp_path / "hub"), tmp_path / "mlx")
    whole = {"bits": 4, "group_size": 64} if EMBED in settings else {}
    change_config(folder, quantization=whole | settings, quantization_config=None)
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert said in one_line(caught)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("predicate", [None, six_bit_embedding_float_gate, mixed])
@pytest.mark.parametrize(
    "named", [{"bits": 4, "group_size": 64}, {"bits": 2, "group_size": 32}, None]
)
def test_what_config_json_does_not_name_is_read_from_the_shapes(
    tmp_path: Path, family: str, predicate: Callable[..., Any] | None, named: dict | None
) -> None:
    source = write_folder(tmp_path / "hub", FAMILIES[family])
    folder = stock_conversion(source, tmp_path / "mlx", predicate=predicate)
    expected = our_logits(folder)
    change_config(folder, quantization=named, quantization_config=named)
    np.testing.assert_array_equal(our_logits(folder), expected)
    if named is not None:  # without any entry mlx-lm does not look for scales
        assert relative_error(our_logits(folder), stock_logits(folder)) < EXACT


@pytest.mark.parametrize("which", ["none", "equal", "other values", "other shape", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_checkpoint_that_stores_its_head(tmp_path: Path, family: str, which: str) -> None:
    folder = write_folder(tmp_path / "model", FAMILIES[family])
    change_tensors(folder, lambda _: None)
    expected = our_logits(folder)

    def add_head(tensors: dict[str, np.ndarray]) -> None:
        head = tensors["model.embed_tokens.weight"].copy()
        if which == "packed":
            tensors["lm_head.scales"] = head[:, :2].copy()
        if which == "other values":
            head[-1, -1] += 0.5
        tensors["lm_head.weight"] = head[:-1].copy() if which == "other shape" else head

    if which != "none":
        change_tensors(folder, add_head)
    if which in ("none", "equal"):
        np.testing.assert_array_equal(our_logits(folder), expected)
        return
    with pytest.raises(InputError, match="differs from the embedding, and config"):
        load_model(folder)


def test_index_of_another_folder_beside_one_complete_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    expected = our_logits(folder)
    index = (folder / INDEX_FILE).read_text()
    change_tensors(folder, lambda _: None)
    (folder / INDEX_FILE).write_text(index)
    (folder / "adapters.safetensors").write_bytes(b"of another program")
    np.testing.assert_array_equal(our_logits(folder), expected)


def test_unknown_keys_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "lfm_mlx"):
        load_model(folder)
        assert caplog.messages == []
        change_config(folder, zeta=1, alpha=2)
        load_model(folder)
    assert caplog.messages == ["config.json: keys without effect here: alpha, zeta"]


# --- tokenizer and the public door ---


def test_load_gives_model_and_tokenizer() -> None:
    model, tokenizer = lfm_mlx.load("demo")
    assert model.config.vocab_size >= tokenizer.vocab_size
    assert load_function is lfm_mlx.load
    assert lfm_mlx.load.load_model is load_model  # pyright: ignore[reportFunctionMemberAccess]
    ids = tokenizer.encode("What is 27 + 58?")
    assert tokenizer.decode(ids).endswith("What is 27 + 58?")


def test_progress_sees_every_parameter(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    seen: list[str] = []

    def progress(parameters: list) -> Any:
        for parameter in parameters:
            seen.append(parameter.name)
            yield parameter

    model = load_model(folder, progress=progress)
    assert seen == [name for name, _ in tree_flatten(model.parameters())]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "model")
    for file in DEMO_FOLDER.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no tokenizer.json; take it from the model's own repository"),
        (POINTER, "is a git-lfs pointer; run `git lfs pull` there"),
        ("{", "the tokenizer cannot be read ("),
        ("", "the tokenizer cannot be read ("),
        ('{"version": "1.0"}', "the tokenizer cannot be read ("),
    ],
)
def test_tokenizer_absent_or_damaged(tokenizer_folder: Path, text: str | None, said: str) -> None:
    load_tokenizer(tokenizer_folder)
    file = tokenizer_folder / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tokenizer_folder)
    assert said in one_line(caught)
    assert str(tokenizer_folder) in str(caught.value)


def test_generate_without_a_tokenizer(tokenizer_folder: Path) -> None:
    (tokenizer_folder / "tokenizer.json").unlink()
    done = command("generate", "--model", tokenizer_folder, "--prompt", "hello")
    assert done.returncode == BAD_INPUT
    assert done.stderr == (
        f"error: {tokenizer_folder}: no tokenizer.json; take it from the model's own repository\n"
    )


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 2], None, (7, 2)),
        (7, 7, (7,)),
        (7, [2, 7], (2, 7)),
        (None, 2, (2,)),
        (None, None, ()),
    ],
)
def test_stop_ids(tmp_path: Path, config: Any, generation: Any, expected: tuple) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        content = json.dumps({"eos_token_id": generation})
        (tmp_path / "generation_config.json").write_text(content)
    assert stop_ids(Checkpoint(tmp_path)) == expected


def test_dense_is_dense(tmp_path: Path) -> None:
    model = load_model(write_folder(tmp_path / "model", DENSE))
    assert not any("switch_mlp" in name for name, _ in tree_flatten(model.parameters()))
