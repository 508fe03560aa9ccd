"""Conversion: stock mlx-lm opens the result and computes the same, whatever ends the run early."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from damage import DAMAGES, NORM
from folders import (
    FAMILIES,
    SPARSE,
    change_tensors,
    command,
    contents,
    our_logits,
    stock_logits,
    stored_tensors,
    write_folder,
)
from mlx_lm import utils
from reference import TRANSFORMERS5_FOLDERS, relative_error, transformers5_answer

from lfm_mlx.checkpoint.hub import DEMO_FOLDER
from lfm_mlx.checkpoint.quantize import MODES, Quantization, Recipe
from lfm_mlx.checkpoint.writer import ShardWriter
from lfm_mlx.cli.command import BAD_INPUT, INTERRUPTED
from lfm_mlx.convert import program as convert_module
from lfm_mlx.convert.program import convert
from lfm_mlx.errors import InputError
from lfm_mlx.load import load_model

EXACT = 2e-6  # of the largest logit: the same float32 sums in another order
PACKINGS = [
    Quantization(bits, group, mode)
    for mode, (bs, gs) in MODES.items()
    for bits in bs
    for group in gs
]
FOUR = Recipe(Quantization.of())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        family: write_folder(root / family, config, seed=3) for family, config in FAMILIES.items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same_tensors(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and mx.array_equal(one[name], other[name])
        for name in one
    )


# --- what is written ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_every_packing_opens_in_mlx_lm(
    tmp_path: Path, sources: dict[str, Path], family: str, packing: Quantization
) -> None:
    out = tmp_path / "out"
    report = convert(sources[family], out, recipe=Recipe(packing))
    assert relative_error(our_logits(out), stock_logits(out)) < EXACT
    assert config_of(out)["quantization"] == {
        "bits": packing.bits, "group_size": packing.group_size, "mode": packing.mode
    }  # fmt: skip
    per_group = 32 if packing.mode == "affine" else 8
    nominal = packing.bits + per_group / packing.group_size
    # the router, the norms and the taps stay as they are
    assert nominal < report.bits_per_weight < nominal + 0.35
    assert report.floating == ()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tensors_are_those_of_mlx_lm_but_for_the_router(
    tmp_path: Path, sources: dict[str, Path], family: str, bits: int
) -> None:
    convert(sources[family], tmp_path / "ours", recipe=Recipe(Quantization.of(bits=bits)))
    model, config = utils.load_model(sources[family], lazy=True)
    model, config = utils.quantize_model(
        model, config, 64, bits, quant_predicate=lambda path, _: not path.endswith(".gate")
    )
    utils.save_model(tmp_path / "theirs", model)
    ours, theirs = stored_tensors(tmp_path / "ours"), stored_tensors(tmp_path / "theirs")
    assert same_tensors(ours, theirs)
    routers = {name: a.dtype for name, a in ours.items() if ".feed_forward.gate." in name}
    assert set(routers.values()) == ({mx.bfloat16} if family == "sparse" else set())
    assert {a.dtype for n, a in ours.items() if "expert_bias" in n} <= {mx.float32}


@pytest.mark.parametrize("recipe", [None, FOUR])
def test_every_spelling_gives_the_same_folder(tmp_path: Path, recipe: Recipe | None) -> None:
    results = []
    for layout in ("hub", "fused", "mlx"):
        source = write_folder(tmp_path / layout, layout=layout, seed=6)
        convert(source, tmp_path / f"{layout}-out", recipe=recipe)
        results.append(stored_tensors(tmp_path / f"{layout}-out"))
    assert same_tensors(results[0], results[1])
    assert same_tensors(results[0], results[2])


@pytest.mark.parametrize("spelling", TRANSFORMERS5_FOLDERS)
def test_folder_saved_by_transformers_5(tmp_path: Path, spelling: str) -> None:
    convert(TRANSFORMERS5_FOLDERS[spelling], tmp_path / "out")
    tokens, logits = transformers5_answer()
    model, _ = utils.load_model(tmp_path / "out")
    assert relative_error(np.array(model(mx.array(tokens)[None])[0]), logits) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("recipe", [None, FOUR])
def test_dtype_of_what_stays_floating(
    tmp_path: Path, sources: dict[str, Path], family: str, dtype: str | None, recipe: Recipe | None
) -> None:
    out = tmp_path / "out"
    convert(sources[family], out, recipe=recipe, dtype=dtype)
    wanted = getattr(mx, dtype or "bfloat16")
    for name, array in stored_tensors(out).items():
        packed = recipe is not None and array.dtype == mx.uint32
        expected = mx.float32 if name.endswith("expert_bias") else wanted
        assert packed or array.dtype == expected, name
    assert config_of(out)["dtype"] == (dtype or "bfloat16")
    assert relative_error(our_logits(out), stock_logits(out)) < EXACT
    if recipe is None:
        assert relative_error(our_logits(out), our_logits(sources[family])) < 1e-2


def test_rules_are_written_per_layer(tmp_path: Path, sources: dict[str, Path]) -> None:
    six, mx4 = Quantization.of(bits=6, group_size=32), Quantization.of("mxfp4")
    for family, down in (("sparse", "switch_mlp.down_proj"), ("dense", "w2")):
        rules = (
            (r"model\.embed_tokens", six),
            (r".*\.(down_proj|w2)", mx4),
            (r".*\.q_proj", None),
        )
        out = tmp_path / family
        report = convert(sources[family], out, recipe=Recipe(Quantization.of(), rules))
        settings = config_of(out)["quantization"]
        assert settings["model.embed_tokens"] == {"bits": 6, "group_size": 32, "mode": "affine"}
        assert settings[f"model.layers.1.feed_forward.{down}"]["mode"] == "mxfp4"
        assert not any("q_proj" in name and "scales" in name for name in stored_tensors(out))
        assert report.floating == ()  # left so by a rule
        assert relative_error(our_logits(out), stock_logits(out)) < EXACT


def test_odd_widths_stay_floating_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SPARSE | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    source, out = write_folder(tmp_path / "hub", config), tmp_path / "out"
    convert_module.main(["--model", str(source), "--out", str(out), "--bits", "4"])
    named = {
        line.rsplit(": ", 1)[1]
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("left floating, its width is not a multiple of the group size: ")
    }
    packed = {n.removesuffix(".scales") for n in stored_tensors(out) if n.endswith(".scales")}
    assert packed == {"model.layers.0.feed_forward.down_proj"} | {
        f"model.layers.{layer}.feed_forward.switch_mlp.down_proj" for layer in (1, 2, 3)
    }
    assert "model.embed_tokens" in named
    assert "model.layers.1.self_attn.q_proj" in named
    assert "model.layers.2.feed_forward.switch_mlp.gate_proj" in named
    assert not any(name.endswith("feed_forward.gate") for name in named)
    assert not named & packed
    assert relative_error(our_logits(out), stock_logits(out)) < EXACT


def test_report_counts_what_is_on_disk(tmp_path: Path, sources: dict[str, Path]) -> None:
    report = convert(sources["sparse"], tmp_path / "out", recipe=FOUR)
    stored = stored_tensors(tmp_path / "out")
    assert report.nbytes == sum(array.nbytes for array in stored.values())
    parameters = sum(array.size for array in stored_tensors(sources["sparse"]).values())
    assert report.bits_per_weight == pytest.approx(8 * report.nbytes / parameters)
    assert 0 < report.seconds < 60
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": report.nbytes, "total_parameters": parameters}


def test_several_shards(
    tmp_path: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(sources["sparse"], tmp_path / "one", recipe=FOUR)
    monkeypatch.setattr(
        convert_module, "ShardWriter", lambda folder: ShardWriter(folder, shard_bytes=100_000)
    )
    convert(sources["sparse"], tmp_path / "many", recipe=FOUR)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    assert same_tensors(stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many"))
    np.testing.assert_array_equal(our_logits(tmp_path / "one"), our_logits(tmp_path / "many"))


def test_what_goes_with_the_weights(tmp_path: Path) -> None:
    source, out = write_folder(tmp_path / "LFM2-tiny"), tmp_path / "out"
    kept = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": "é"}',
        "chat_template.jinja": "{{ messages }}\n",
        "generation_config.json": '{"temperature": 0.2}',
        "LICENSE": "LFM Open License v1.0",
    }
    for name, text in (kept | {"README.md": "# of the source"}).items():
        (source / name).write_text(text, encoding="utf-8")
    convert(source, out, recipe=FOUR)
    files = contents(out)
    assert {name: files[name].decode() for name in kept} == kept
    assert set(files) == {*kept, "config.json", "model.safetensors", "model.safetensors.index.json"}
    config = config_of(out)
    assert config["conversion"]["source"] == "LFM2-tiny"
    assert config["conversion"]["tool"].startswith("lfm_mlx ")
    assert config["quantization"] == config["quantization_config"]
    before = config_of(source)
    assert {key: config[key] for key in before} == before


def test_demo_opens_in_mlx_lm(tmp_path: Path) -> None:
    convert("demo", tmp_path / "out", recipe=Recipe(Quantization.of(bits=8)))
    model, tokenizer = utils.load(str(tmp_path / "out"))
    model.set_dtype(mx.float32)
    ids = tokenizer.encode("What is 27 + 58?")
    logits = np.array(model(mx.array([ids])))
    ours = np.array(load_model(tmp_path / "out")(mx.array([ids])))
    assert relative_error(ours, logits) < 1e-4
    assert ours[0, -1].argmax() == logits[0, -1].argmax()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        DEMO_FOLDER / "tokenizer.json"
    ).read_bytes()


def test_no_more_than_a_few_parameters_are_in_memory(tmp_path: Path) -> None:
    config = SPARSE | {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 24}
    config |= {"num_hidden_layers": 8, "layer_types": ["conv"] * 8}
    source = write_folder(tmp_path / "hub", config, shard_bytes=20_000_000)
    total = sum(array.nbytes for array in stored_tensors(source).values())
    largest = 24 * 256 * 256 * 2
    assert total > 20 * largest
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    convert(source, tmp_path / "out", recipe=FOUR)
    # What waits to be written (all of it, in one shard), two parameters, and what is made of them.
    assert mx.get_peak_memory() - before < 0.29 * total + 4 * largest


# --- what is refused ---


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_that_is_there(tmp_path: Path, sources: dict[str, Path]) -> None:
    out = tmp_path / "out"
    convert(sources["sparse"], out, recipe=FOUR)
    before = contents(tmp_path)
    assert "is there already; give another name, or force" in refused(sources["dense"], out)
    assert contents(tmp_path) == before
    convert(sources["dense"], out, force=True)
    assert config_of(out)["model_type"] == "lfm2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_source_is_never_replaced(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    source = write_folder(outer / "source")
    (outer / "config.json").write_text("{}")
    (outer / "model.safetensors").write_bytes(b"")
    (tmp_path / "link").symlink_to(source)
    before = contents(tmp_path)
    for out in (source, outer, tmp_path / "link", source / ".." / "source"):
        assert "holds the source" in refused(source, out, recipe=FOUR, force=True)
    assert contents(tmp_path) == before


def test_quantized_source(tmp_path: Path, sources: dict[str, Path]) -> None:
    convert(sources["dense"], tmp_path / "out", recipe=FOUR)
    message = refused(tmp_path / "out", tmp_path / "again", recipe=FOUR)
    assert message == (
        f"{tmp_path / 'out'}: is quantized already; convert the original checkpoint instead"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", [None, FOUR])
def test_disk_too_small(
    tmp_path: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe | None,
) -> None:  # fmt: skip
    out = tmp_path / "new" / "out"
    nbytes = convert(sources["sparse"], tmp_path / "probe", recipe=recipe).nbytes
    monkeypatch.setattr(convert_module, "free_bytes", lambda folder: nbytes)
    convert(sources["sparse"], tmp_path / "fits", recipe=recipe)
    monkeypatch.setattr(convert_module, "free_bytes", lambda folder: nbytes - 1)
    assert "GB will be written and 0.0 GB are free" in refused(
        sources["sparse"], out, recipe=recipe
    )
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_check_refuses_bad_weights(tmp_path: Path, value: float) -> None:
    source = write_folder(tmp_path / "hub")
    change_tensors(source, lambda tensors: tensors[NORM].__setitem__(7, value))
    message = refused(source, tmp_path / "out", check=True, recipe=FOUR)
    assert message == f"weights with NaN or infinity: {NORM}; download or convert them again"
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model")
    DAMAGES[name].apply(folder)
    before = contents(tmp_path)
    assert DAMAGES[name].said in refused(folder, tmp_path / "out", recipe=FOUR)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


def test_dtype_that_is_not_known(tmp_path: Path, sources: dict[str, Path]) -> None:
    assert "supported: float32" in refused(sources["dense"], tmp_path / "out", dtype="int8")


# --- the command ---


def test_command_says_bits_size_and_time(tmp_path: Path, sources: dict[str, Path]) -> None:
    out = tmp_path / "out"
    done = command("convert", "--model", sources["sparse"], "--out", out, "--mode", "mxfp8")
    assert (done.returncode, done.stderr) == (0, "")
    path, bits, size, seconds = done.stdout.replace(": ", ", ").strip().split(", ")
    assert path == str(out)
    assert bits.endswith(" bits per weight")
    assert 8.25 < float(bits.split()[0]) < 8.5
    assert size.endswith(" GB")
    assert seconds.endswith(" s")
    assert config_of(out)["quantization"] == {"bits": 8, "group_size": 32, "mode": "mxfp8"}


@pytest.mark.parametrize(
    ("arguments", "packing"),
    [
        ([], None),
        (["--bits", "3"], Quantization(3, 64)),
        (["--group-size", "32"], Quantization(4, 32)),
        (["--bits", "8", "--group-size", "128", "--mode", "affine"], Quantization(8, 128)),
        (["--mode", "nvfp4"], Quantization(4, 16, "nvfp4")),
    ],
)
def test_recipe_of_the_options(arguments: list[str], packing: Quantization | None) -> None:
    args = convert_module.parser().parse_args(["--model", "a", "--out", "b", *arguments])
    recipe = convert_module.recipe_of(args)
    assert (recipe and recipe.default) == packing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "7"], "bits is 7 in mode affine; supported: 2, 3, 4, 5, 6, 8"),
        (["--bits", "0"], "bits is 0 in mode affine"),
        (["--bits", "8", "--mode", "mxfp4"], "bits is 8 in mode mxfp4; supported: 4"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, sources: dict[str, Path], arguments: list[str], said: str,
) -> None:  # fmt: skip
    line = ["--model", str(sources["dense"]), "--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(InputError, match=said):
        convert_module.main(line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["shard cut off", "GGUF"])
def test_command_ends_with_one_line_and_code_2(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "model")
    DAMAGES[name].apply(folder)
    before = contents(tmp_path)
    done = command("convert", "--model", folder, "--out", tmp_path / "out", "--bits", 4)
    assert done.returncode == BAD_INPUT, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert DAMAGES[name].said in done.stderr
    assert contents(tmp_path) == before


# --- interruptions ---

# Runs the command with a function replaced by one that first counts and then does something.
STOPPED = """
import os, signal, sys, time
from pathlib import Path
from lfm_mlx import files
from lfm_mlx.cli.entry import start
from lfm_mlx.convert import program as convert
from lfm_mlx.checkpoint.writer import ShardWriter
def before(owner, name, act):
    original, calls = getattr(owner, name), []
    def replaced(*args, **options):
        calls.append(args)
        act(len(calls), args)
        return original(*args, **options)
    setattr(owner, name, replaced)
def stop_at(number):
    return lambda count, args: os.kill(os.getpid(), {signal}) if count == number else None
{where}
sys.exit(start("convert"))
"""
MOMENTS = {
    "first tensor": "before(ShardWriter, 'add', stop_at(1))",
    "later tensor": "before(ShardWriter, 'add', stop_at(30))",
    "index": "before(ShardWriter, 'finish', stop_at(1))",
    "config": "before(convert, 'write_json', stop_at(1))",
    "last step": "before(files, '_take_place', stop_at(1))",
}
# The old folder was renamed and the new one was not: of the two renames that replace a folder.
BETWEEN = """
def act(count, args):
    if ".partial-" in args[0].name:
        os.kill(os.getpid(), 2)
before(Path, "rename", act)
"""


def run_stopped(number: int, where: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    code = STOPPED.format(signal=number, where=where)
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(tmp_path: Path, sources: dict[str, Path], moment: str) -> None:
    out = tmp_path / "out"
    convert(sources["dense"], out)
    before = contents(out)
    done = run_stopped(
        signal.SIGKILL, MOMENTS[moment], "--model", sources["sparse"], "--out", out, "--bits", 4,
        "--force",
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert contents(out) == before
    left = [path for path in tmp_path.iterdir() if path != out]
    # Its name says what it is; before the last step it cannot be taken for a checkpoint either.
    assert all(path.name.startswith(".out.partial-") for path in left)
    assert moment == "last step" or not any((path / "config.json").exists() for path in left)
    convert(sources["sparse"], out, recipe=FOUR, force=True)
    assert config_of(out)["model_type"] == "lfm2_moe"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("moment", "force"), [("later tensor", False), ("last step", True), ("between", True)]
)
def test_interrupted(tmp_path: Path, sources: dict[str, Path], moment: str, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        convert(sources["dense"], out)
    before = contents(tmp_path)
    options = ["--force"] if force else []
    done = run_stopped(
        signal.SIGINT,
        MOMENTS.get(moment, BETWEEN),
        "--model",
        sources["sparse"],
        "--out",
        out,
        *options,
    )
    assert (done.returncode, done.stderr) == (INTERRUPTED, "lfm_mlx.convert: interrupted\n")
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == int(force)


def test_interrupted_from_outside(tmp_path: Path, sources: dict[str, Path]) -> None:
    slowly = "before(ShardWriter, 'add', lambda count, args: time.sleep(0.2))"
    code = STOPPED.format(signal=0, where=slowly)
    out = tmp_path / "out"
    line = [sys.executable, "-c", code, "--model", sources["sparse"], "--out", out]
    with subprocess.Popen(
        [str(part) for part in line], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(".out.partial-*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (INTERRUPTED, "lfm_mlx.convert: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [None, FOUR])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.conv.in_proj.weight",
        "model.layers.2.ffn_norm.weight",
        "model.layers.1.feed_forward.experts.2.w1.weight",
    ],
)
def test_what_float16_cannot_hold_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: Recipe | None, name: str
) -> None:
    source = write_folder(tmp_path / "hub")
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name] * 1e7}))
    bits = [] if recipe is None else ["--bits", "4"]
    line = ["--model", str(source), "--out", str(tmp_path / "out"), "--dtype", "float16", *bits]
    assert convert_module.main(line) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert " is beyond float16, which ends at 65504; take another dtype: bfloat16" in said
    checked = refused(source, tmp_path / "checked", dtype="float16", recipe=recipe, check=True)
    assert said == f"{checked}\n"
    with pytest.raises(InputError, match="is beyond float16"):
        load_model(source, dtype="float16")
    assert convert_module.main([*line, "--force", "--dtype", "bfloat16"]) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("recipe", [None, FOUR])
def test_weights_that_are_no_numbers_are_said_without_asking(
    tmp_path: Path, recipe: Recipe | None, bad: float
) -> None:
    source, name = write_folder(tmp_path / "hub"), "model.layers.0.conv.in_proj.weight"

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][3, 5] = bad

    change_tensors(source, spoil)
    said = f"weights with NaN or infinity: {name}; download or convert them again"
    assert convert(source, tmp_path / "out", recipe=recipe).noted == (said,)
    assert refused(source, tmp_path / "checked", recipe=recipe, check=True) == said
    assert not (tmp_path / "checked").exists()
