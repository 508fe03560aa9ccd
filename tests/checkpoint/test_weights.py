"""The rename table and its proof: all spellings fill the same parameters, faults are named."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folders import DENSE, SPARSE
from make_random_checkpoint import plan as planned
from make_random_checkpoint import random_tensors
from mlx.utils import tree_flatten

from lfm_mlx import Config, Model
from lfm_mlx.checkpoint import weights
from lfm_mlx.checkpoint.folder import TensorInfo
from lfm_mlx.errors import InputError

EXPERT = "model.layers.2.feed_forward.experts.3.w1.weight"
Infos = dict[str, TensorInfo]


def infos_of(config: dict[str, Any], layout: str = "hub") -> Infos:
    entries = planned(config, layout)
    return {entry.name: TensorInfo(entry.dtype, entry.shape, Path("a")) for entry in entries}


def planned_parameters(config: dict[str, Any], infos: Infos) -> list[weights.Parameter]:
    parsed = Config.from_dict(config)
    return weights.plan(parsed, infos, dict(tree_flatten(Model(parsed).parameters())))


def fault(infos: Infos, config: dict[str, Any] = SPARSE) -> str:
    with pytest.raises(InputError) as caught:
        planned_parameters(config, infos)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tensors_in_layout(config: dict[str, Any], layout: str, seed: int) -> dict[str, mx.array]:
    """A layout's tensors from the hub's, put together by their rows as the script declares them."""
    hub = random_tensors(config, seed)
    made = {}
    for entry in planned(config, layout):
        rows = np.concatenate([hub[name].reshape(-1) for name, _ in entry.parts])
        made[entry.name] = mx.array(rows.reshape(entry.shape))
    return made


@pytest.mark.parametrize("config", [SPARSE, DENSE, SPARSE | {"conv_bias": True, "conv_L_cache": 1}])
@pytest.mark.parametrize("layout", ["hub", "fused", "mlx"])
@pytest.mark.parametrize("seed", [0, 3])
def test_every_layout_makes_the_same_parameters(config: dict, layout: str, seed: int) -> None:
    hub = random_tensors(config, seed)
    arrays = tensors_in_layout(config, layout, seed)
    parameters = planned_parameters(config, infos_of(config, layout))
    built = {p.name: np.array(p.join(parts)) for p, parts in weights.build_each(parameters, arrays)}
    assert arrays == {}
    used = 0
    for name, values in hub.items():
        used += values.size
        if ".experts." in name:
            path, index, which = name.removesuffix(".weight").replace(".experts", "").rsplit(".", 2)
            target = built[f"{path}.switch_mlp.{weights.PROJECTIONS[which]}.weight"][int(index)]
        elif ".feed_forward.w" in name:
            target = built[weights.own_name(Config.from_dict(config), name)]
        else:
            target = built[name]
            values = values.swapaxes(1, 2) if name.endswith("conv.conv.weight") else values
        np.testing.assert_array_equal(target, values, err_msg=name)
    assert used == sum(array.size for array in built.values())


def test_a_source_of_two_parameters_is_kept_until_the_second() -> None:
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    parameters = planned_parameters(SPARSE, infos_of(SPARSE, "fused"))
    arrays = tensors_in_layout(SPARSE, "fused", 0)
    readers = []
    for parameter, _ in weights.build_each(parameters, arrays):
        if name in parameter.sources:
            readers.append((parameter.name.rsplit(".", 2)[1], name in arrays))
    assert readers == [("gate_proj", True), ("up_proj", False)]


def test_parameters_come_in_the_order_of_the_layers() -> None:
    names = [parameter.name for parameter in planned_parameters(SPARSE, infos_of(SPARSE))]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(infos_of(SPARSE)))
def test_each_missing_tensor_is_named(name: str) -> None:
    infos = infos_of(SPARSE)
    del infos[name]
    message = fault(infos)
    if ".experts." in name:
        path, index, which = name.removesuffix(".weight").replace(".experts", "").rsplit(".", 2)
        assert (
            f"{path}.switch_mlp.{weights.PROJECTIONS[which]}.weight wants experts 0 to 4" in message
        )
        assert f"lacks {index}" in message
    else:
        for hub, ours in weights.PROJECTIONS.items():
            name = name.replace(f".feed_forward.{hub}.", f".feed_forward.{ours}.")
        assert f"missing: {name}" in message
    assert "not part" not in message


def test_missing_and_left_over_are_sorted() -> None:
    infos = infos_of(SPARSE)
    for layer in (2, 0):
        infos[f"model.layers.{layer}.extra.weight"] = infos.pop(
            f"model.layers.{layer}.operator_norm.weight"
        )
    infos["vision.a"] = infos["model.layers.2.extra.weight"]
    message = fault(infos)
    assert (
        "missing: model.layers.0.operator_norm.weight, model.layers.2.operator_norm.weight; "
        "not part of the model: model.layers.0.extra.weight, model.layers.2.extra.weight, vision.a"
    ) in message


def test_many_faults_are_counted() -> None:
    infos = {name: info for name, info in infos_of(SPARSE).items() if "norm" not in name}
    assert "and 5 more" in fault(infos)  # 4 x 2 norms, 2 x 2 of attention and the last one: 13
    narrow = {n: TensorInfo("BF16", (3, *i.shape[1:]), i.file) for n, i in infos_of(SPARSE).items()}
    assert len(fault(narrow)) < 1500


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.conv.conv.weight",
        "model.layers.1.feed_forward.expert_bias",
        "model.layers.1.self_attn.k_proj.weight",
        EXPERT,
    ],
)
def test_wrong_shape_names_the_tensor(name: str) -> None:
    infos = infos_of(SPARSE)
    shape = (infos[name].shape[0] + 1, *infos[name].shape[1:])
    infos[name] = TensorInfo("BF16", shape, Path("a"))
    message = fault(infos)
    assert f"{name}: shape (" in message
    assert str(shape[0]) in message
    assert "expected" in message


@pytest.mark.parametrize("dtype", ["U32", "I64", "U8", "BOOL", "F64"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", EXPERT])
def test_wrong_dtype_names_the_tensor(dtype: str, name: str) -> None:
    infos = infos_of(SPARSE)
    infos[name] = TensorInfo(dtype, infos[name].shape, Path("a"))
    assert f"{name}: dtype {dtype}, expected " in fault(infos)


@pytest.mark.parametrize("index", ["5", "01"])
def test_expert_too_many(index: str) -> None:
    infos = infos_of(SPARSE)
    name = EXPERT.replace(".3.", f".{index}.")
    infos[name] = infos[EXPERT]
    message = fault(infos)
    assert f"has also {index}" in message or f"not part of the model: {name}" in message


def test_two_spellings_of_one_parameter() -> None:
    infos = infos_of(SPARSE)
    spelling = "model.layers.0.feed_forward.gate_proj.weight"
    infos[spelling] = infos["model.layers.0.feed_forward.w1.weight"]
    message = fault(infos)
    assert (
        "stored a second time under another name: model.layers.0.feed_forward.w1.weight" in message
    )


def test_fused_experts_of_odd_height_have_no_halves() -> None:
    infos = infos_of(SPARSE, "fused")
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    experts, height, width = infos[name].shape
    infos[name] = TensorInfo("BF16", (experts, height + 1, width), Path("a"))
    assert f"{name}: shape (5, 257, 128), expected (5, 128, 128)" in fault(infos)
    infos[name] = TensorInfo("BF16", (height,), Path("a"))
    assert f"not part of the model: {name}" in fault(infos)


def test_experts_of_a_dense_model_are_left_over() -> None:
    infos = infos_of(DENSE)
    infos["model.layers.0.feed_forward.experts.gate_up_proj"] = TensorInfo(
        "BF16", (2, 4, 4), Path()
    )
    assert "not part of the model: model.layers.0.feed_forward.experts.gate_up_proj" in fault(
        infos, DENSE
    )


def test_head_of_a_tied_model_is_left_over() -> None:
    infos = infos_of(SPARSE)
    infos["lm_head.weight"] = infos["model.embed_tokens.weight"]
    assert "not part of the model: lm_head.weight" in fault(infos)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, None])
def test_cast_keeps_expert_bias_in_float32(dtype: mx.Dtype | None) -> None:
    for stored in (mx.bfloat16, mx.float32):
        bias = weights.cast("model.layers.3.feed_forward.expert_bias", mx.ones(4, stored), dtype)
        assert bias.dtype == mx.float32
        gate = weights.cast("model.layers.3.feed_forward.gate.weight", mx.ones(4, stored), dtype)
        assert gate.dtype == (stored if dtype is None else dtype)
    packed = weights.cast("model.embed_tokens.weight", mx.ones(4, mx.uint32), dtype)
    assert packed.dtype == mx.uint32


@pytest.mark.parametrize(
    ("hub", "mlx"), [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")]
)
def test_each_family_has_its_own_name_of_a_projection(hub: str, mlx: str) -> None:
    dense, sparse = Config.from_dict(DENSE), Config.from_dict(SPARSE)
    path = "model.layers.0.feed_forward"
    for rest in ("", ".weight", ".scales", ".lora_a"):
        for spelling in (hub, mlx):
            assert weights.own_name(dense, f"{path}.{spelling}{rest}") == f"{path}.{hub}{rest}"
            assert weights.own_name(sparse, f"{path}.{spelling}{rest}") == f"{path}.{mlx}{rest}"
    for name in ("model.layers.0.conv.in_proj.weight", f"{path}.gate.weight", "w1.weight"):
        assert weights.own_name(dense, name) == weights.own_name(sparse, name) == name


@pytest.mark.parametrize(
    ("ending", "method"),
    [("qweight", "AWQ or GPTQ"), ("weight_packed", "compressed-tensors"), ("weight_scale", "fp8")],
)
def test_tensors_of_another_quantization_are_refused_by_its_name(ending: str, method: str) -> None:
    infos = infos_of(SPARSE)
    name = "model.layers.1.self_attn.q_proj"
    infos[f"{name}.{ending}"] = infos.pop(f"{name}.weight")
    assert f"{name}.{ending}: is quantized as {method}, which MLX does not read" in fault(infos)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_values(bad: float) -> None:
    good = np.ones((3, 5), np.float32)
    arrays = {"a": mx.array(good), "b": mx.array(good), "c": mx.ones((2,), mx.uint32)}
    assert weights.bad_values(arrays, sorted(arrays)) == []
    good[2, 4] = bad
    arrays["b"] = mx.array(good).astype(mx.bfloat16)
    assert weights.bad_values(arrays, sorted(arrays)) == ["b"]
