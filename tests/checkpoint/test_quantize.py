"""Recipes and packings, and the settings of a quantized folder's config.json."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import DENSE, SPARSE, stock_logits, write_folder
from mlx.utils import tree_flatten
from mlx_lm import utils

from lfm_mlx import Config, Model
from lfm_mlx.checkpoint import quantize
from lfm_mlx.checkpoint.folder import TensorInfo
from lfm_mlx.checkpoint.quantize import MODES, Quantization, Recipe
from lfm_mlx.errors import InputError

ALL = [
    Quantization(bits, group, mode)
    for mode, (bs, gs) in MODES.items()
    for bits in bs
    for group in gs
]


def values(rows: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("packing", ALL, ids=str)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_pack_is_as_precise_as_its_bits(packing: Quantization, dtype: mx.Dtype) -> None:
    weight = mx.array(values(7, 256, packing.bits)).astype(dtype)
    parts = packing.pack(weight)
    assert set(parts) == {"weight", "scales"} | ({"biases"} if packing.mode == "affine" else set())
    assert parts["weight"].dtype == mx.uint32
    back = mx.dequantize(
        parts["weight"], parts["scales"], parts.get("biases"),
        packing.group_size, packing.bits, packing.mode,
    )  # fmt: skip
    error = np.abs(np.array((back - weight).astype(mx.float32)))
    if packing.mode == "affine":
        # A step between the least and the greatest value of each group, which MLX moves a little
        # so that zero is exact; and the scale's own rounding, where the dtype's digits are few.
        groups = np.array(weight.astype(mx.float32)).reshape(7, -1, packing.group_size)
        step = np.ptp(groups, axis=-1, keepdims=True) / (2**packing.bits - 1)
        most = step if dtype == mx.float32 else step + 0.04
        assert (error.reshape(groups.shape) <= most).all()
    else:
        assert 0 < error.mean() < (0.03 if packing.bits == 8 else 0.15)


@pytest.mark.parametrize("packing", ALL, ids=str)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_nbytes_is_what_packing_takes(packing: Quantization, dtype: mx.Dtype) -> None:
    weight = mx.zeros((3, 5, 384), dtype)
    taken = sum(part.nbytes for part in packing.pack(weight).values())
    assert packing.nbytes(weight.size, dtype.size) == taken


def test_packing_experts_one_by_one_is_packing_them_together() -> None:
    weight = mx.array(values(6, 128, 0)).reshape(3, 2, 128)
    for packing in ALL:
        together = packing.pack(weight)
        for expert in range(3):
            for key, part in packing.pack(weight[expert]).items():
                assert mx.array_equal(together[key][expert], part)


def test_defaults_of_each_mode() -> None:
    assert Quantization.of() == Quantization(4, 64, "affine")
    assert Quantization.of(bits=6) == Quantization(6, 64, "affine")
    assert Quantization.of(group_size=128) == Quantization(4, 128, "affine")
    assert [Quantization.of(mode).group_size for mode in MODES] == [64, 32, 32, 16]
    assert Quantization.of("mxfp8").bits == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("affine", 7), "bits is 7 in mode affine; supported: 2, 3, 4, 5, 6, 8"),
        (("affine", 0), "bits is 0 in mode affine"),
        (("affine", 4.0), "bits is 4.0 in mode affine"),
        (("affine", True), "bits is True in mode affine"),
        (("affine", 4, 48), "group size is 48 in mode affine; supported: 32, 64, 128"),
        (("affine", 4, 0), "group size is 0"),
        (("mxfp4", 8), "bits is 8 in mode mxfp4; supported: 4"),
        (("nvfp4", 4, 32), "group size is 32 in mode nvfp4; supported: 16"),
        (("nf4",), "mode is 'nf4'; supported: affine, mxfp4, mxfp8, nvfp4"),
        ((None,), "mode is None"),
        ((["affine"],), r"mode is \['affine'\]"),
    ],
)
def test_what_mlx_lacks_is_refused(arguments: tuple, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Quantization.of(*arguments)


def test_recipe_never_packs_the_router() -> None:
    # not even when a rule asks for it
    recipe = Recipe(Quantization.of(), ((r".*\.feed_forward\.gate", Quantization.of(bits=8)),))
    assert recipe.packing("model.layers.7.feed_forward.gate") is None
    assert recipe.packing("model.layers.7.feed_forward.gate_proj") == Quantization.of()
    assert recipe.packing("model.layers.7.feed_forward.switch_mlp.gate_proj") == Quantization.of()


def test_first_rule_that_matches_in_full_wins() -> None:
    six, eight = Quantization.of(bits=6), Quantization.of(bits=8)
    recipe = Recipe(
        Quantization.of(),
        ((r"model\.embed_tokens", six), (r".*embed.*", eight), (r".*q_proj", None)),
    )
    assert recipe.packing("model.embed_tokens") == six
    assert recipe.packing("model.embed_tokens_2") == eight
    assert recipe.packing("model.layers.2.self_attn.q_proj") is None
    assert recipe.packing("model.layers.2.self_attn.q_proj_2") == Quantization.of()


def test_packings_tell_apart_what_a_rule_and_what_the_width_leaves() -> None:
    recipe = Recipe(
        Quantization.of(group_size=64), ((r"c", None), (r"d", Quantization.of(group_size=32)))
    )
    packings, odd = recipe.packings({"a": 128, "b": 96, "c": 96, "d": 96})
    assert packings == {"a": Quantization.of(), "d": Quantization.of(group_size=32)}
    assert odd == ["b"]


@pytest.mark.parametrize("config", [SPARSE, DENSE])
def test_packable_are_the_matrices(config: dict[str, Any]) -> None:
    model = Model(Config.from_dict(config))
    parameters = dict(tree_flatten(model.parameters()))
    matrices = {
        name.removesuffix(".weight"): array.shape[-1]
        for name, array in parameters.items()
        if array.ndim > 1 and not name.endswith("conv.conv.weight")
    }
    assert quantize.packable(model) == matrices


def packed_names(
    settings: dict[str, Any] | None, packed: dict[str, Quantization], config: dict = SPARSE
) -> dict:
    """Path → packing of the modules that `pack_modules` replaces, for what is stored so."""
    model = Model(Config.from_dict(config))
    widths = quantize.packable(model)
    stored = {path: stored_as(packing, widths[path]) for path, packing in packed.items()}
    made = quantize.pack_modules(model, settings, stored, lambda path: path)
    found = {
        path: (module.bits, module.group_size, module.mode)
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }
    assert found == {path: (p.bits, p.group_size, p.mode) for path, p in made.items()}
    return found


def stored_as(packing: Quantization, width: int) -> quantize.Stored:
    scales = "BF16" if packing.mode == "affine" else "U8"
    return quantize.Stored(
        TensorInfo("U32", (3, width * packing.bits // 32), Path()),
        TensorInfo(scales, (3, width // packing.group_size), Path()),
    )


EMBED, GATE = "model.embed_tokens", "model.layers.2.feed_forward.gate"
STACK = "model.layers.2.feed_forward.switch_mlp.up_proj"
FOUR = Quantization.of()


def test_modules_with_scales_are_packed_as_their_entry_says() -> None:
    settings = {"bits": 4, "group_size": 64, EMBED: {"bits": 6, "group_size": 32}, GATE: True}
    assert packed_names(settings, dict.fromkeys((EMBED, GATE, STACK), FOUR)) == {
        EMBED: (6, 32, "affine"),
        GATE: (4, 64, "affine"),
        STACK: (4, 64, "affine"),
    }


def test_modules_without_scales_stay_floating_whatever_their_entry() -> None:
    settings = {"bits": 4, "group_size": 64, EMBED: {"bits": 6, "group_size": 32}}
    assert packed_names(settings, {STACK: FOUR}) == {STACK: (4, 64, "affine")}
    assert packed_names(settings | {STACK: False}, {STACK: FOUR}) == {}


@pytest.mark.parametrize("settings", [None, {"bits": 5, "group_size": 64}, {GATE: False}])
@pytest.mark.parametrize("packing", ALL, ids=str)
def test_what_has_no_entry_is_inferred_from_the_shapes(
    settings: Any, packing: Quantization
) -> None:
    expected = {STACK: (packing.bits, packing.group_size, packing.mode)}
    assert packed_names(settings, {STACK: packing}) == expected


@pytest.mark.parametrize(
    ("words", "groups", "dtype"),
    [(16, 3, "F32"), (16, 0, "F32"), (28, 2, "F32"), (17, 2, "F32"), (16, 2, "U8"), (24, 4, "U8"),
     (16, 128, "F32")],
)  # fmt: skip
def test_shapes_of_no_quantization(words: int, groups: int, dtype: str) -> None:
    weight, scales = TensorInfo("U32", (3, words), Path()), TensorInfo(dtype, (3, groups), Path())
    with pytest.raises(InputError, match=f"^a: {words} words and {groups} scales for 128 inputs"):
        quantize.Stored(weight, scales).packing("a", 128)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"mode": "nf4"}, "mode is 'nf4'"),
        ({"bits": 1, "group_size": 64}, "bits is 1"),
        ({"bits": "4", "group_size": 64}, "bits is '4'"),
        ({"bits": 4, "group_size": 64, "global_scale": True}, "quantization has 'global_scale'"),
        ({"bits": 4, "group_size": 64, "desc_act": 1}, "quantization has 'desc_act'"),
    ],
)
def test_settings_that_are_not_understood(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        packed_names({"bits": 4, "group_size": 64, STACK: entry}, {STACK: FOUR})


def test_settings_for_no_module() -> None:
    with pytest.raises(InputError, match=r"no module of this model: \['model.layers.9.x'\]"):
        packed_names({"bits": 4, "group_size": 64, "model.layers.9.x": {"bits": 8}}, {})


def test_group_that_does_not_divide_the_width() -> None:
    settings = {"bits": 4, "group_size": 64, STACK: {"bits": 4, "group_size": 128}}
    with pytest.raises(InputError, match=f"{STACK} has group_size 128; .* its width 96"):
        packed_names(settings, {STACK: FOUR}, SPARSE | {"hidden_size": 96})


def test_group_sizes_and_bits_are_those_of_mlx() -> None:
    """What the table says MLX has, it has; and the neighbours it lacks."""
    weight = mx.zeros((2, 256))
    for packing in ALL:
        mx.eval(*packing.pack(weight).values())
    for bits, group, mode in ((7, 64, "affine"), (4, 16, "affine"), (4, 64, "mxfp4")):
        with pytest.raises(ValueError, match=r"(?i)bits|group"):
            mx.quantize(weight, group, bits, mode=mode)


def test_error_shrinks_with_bits(tmp_path: Path) -> None:
    """Stock mlx-lm as the judge of the logits that a packing leaves."""
    folder = write_folder(tmp_path / "model")
    exact = stock_logits(folder)
    errors = []
    for bits in (2, 4, 8):
        model, config = utils.load_model(folder)
        model.set_dtype(mx.float32)
        model, config = utils.quantize_model(model, config, 64, bits)
        out = tmp_path / str(bits)
        utils.save_model(out, model)
        utils.save_config(config, out / "config.json")
        errors.append(float(np.abs(stock_logits(out) - exact).mean()))
    assert errors[0] > errors[1] > errors[2] > 0
    assert math.isfinite(errors[0])
