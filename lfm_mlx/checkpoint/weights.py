"""From a checkpoint's tensors to the model's parameters: the rename table and its proof.

Three spellings are read: the hub's (experts one by one: w1, w2, w3), transformers 5's fused one
(gate_up_proj, down_proj over all experts), and mlx-lm's (switch_mlp, quantized or not), which is
also the model's own. `plan` says for every parameter which tensors make it, and proves that every
tensor is used and every parameter filled, with its shape.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from lfm_mlx.checkpoint.folder import TensorInfo, listing
from lfm_mlx.config import Config
from lfm_mlx.errors import InputError

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
DENSE = re.compile(r"(model\.layers\.\d+\.feed_forward)\.(\w+)((?:\.\w+)*)")
EXPERT = re.compile(r"(model\.layers\.\d+\.feed_forward)\.experts\.(0|[1-9]\d*)\.(w[123])\.weight")
FUSED = re.compile(r"(model\.layers\.\d+\.feed_forward)\.experts\.(gate_up_proj|down_proj)")
CONV = re.compile(r"model\.layers\.\d+\.conv\.conv\.weight")
# Kept in float32 whatever the dtype of the rest: the router adds them to float32 scores.
FLOAT32 = re.compile(r"model\.layers\.\d+\.feed_forward\.expert_bias")

FLOATS = {"BF16", "F16", "F32"}
# Endings of tensors that MLX does not read, and the quantization that has them.
FOREIGN = {
    ".qweight": "AWQ or GPTQ", ".weight_packed": "compressed-tensors", ".weight_scale": "fp8",
    ".weight_scale_inv": "fp8", ".weight.absmax": "bitsandbytes", ".trellis": "EXL3",
}  # fmt: skip
# What to do about weights that are no numbers.
HEAL = "download or convert them again"
# safetensors' names of what MLX packs into; a tensor of any other dtype is refused.
PACKED = {"U32": mx.uint32, "U8": mx.uint8}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model: the tensors it is made of, and how."""

    name: str
    sources: tuple[str, ...]
    how: Literal["same", "stack", "first_half", "second_half", "taps"] = "same"

    def build(self, arrays: Mapping[str, mx.array]) -> mx.array:
        """The parameter's array, lazy, from the checkpoint's lazy arrays."""
        return self.join(self.parts(arrays))

    def parts(self, arrays: Mapping[str, mx.array]) -> list[mx.array]:
        """The arrays that `join` makes one: every expert's matrix, or the parameter as a whole."""
        parts = [arrays[source] for source in self.sources]
        if self.how == "taps":
            return [mx.swapaxes(parts[0], 1, 2)]  # [D, 1, W] -> [D, W, 1]
        if self.how in ("first_half", "second_half"):
            half = parts[0].shape[1] // 2  # [E, 2F, D] -> [E, F, D]
            return [parts[0][:, :half] if self.how == "first_half" else parts[0][:, half:]]
        return parts

    def join(self, parts: Sequence[mx.array]) -> mx.array:
        """One array of `parts`, or of something made of each of them."""
        return mx.stack(list(parts)) if self.how == "stack" else parts[0]  # E x [F, D] -> [E, F, D]

    def part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part that a source of this shape becomes."""
        if self.how == "taps":
            return (shape[0], shape[2], shape[1])
        if self.how in ("first_half", "second_half") and shape[1] % 2 == 0:
            return (shape[0], shape[1] // 2, *shape[2:])
        return shape


# Wraps the list of parameters that are read, to show how far reading has come.
Progress = Callable[[list[Parameter]], Iterable[Parameter]]


def build_each(
    parameters: list[Parameter], arrays: dict[str, mx.array], progress: Progress = iter
) -> Iterator[tuple[Parameter, list[mx.array]]]:
    """Every parameter with its lazy parts; a source is forgotten after the last one that reads it.

    So no more of the checkpoint is in memory than the caller holds on to. Empties `arrays`.
    """
    readers = Counter(source for parameter in parameters for source in parameter.sources)
    for parameter in progress(parameters):
        parts = parameter.parts(arrays)
        for source in parameter.sources:
            readers[source] -= 1
            if not readers[source]:
                del arrays[source]
        yield parameter, parts
        del parts


def plan(
    config: Config, tensors: Mapping[str, TensorInfo], expected: Mapping[str, mx.array]
) -> list[Parameter]:
    """Plan how to make every parameter in `expected` (name → array of its shape) from `tensors`.

    In the order of the model's layers. Raises InputError that lists, sorted, the tensors that are
    missing, left over, of a wrong shape, or floating where packed integers belong (or vice versa).
    """
    for name in sorted(tensors):
        for ending, method in FOREIGN.items():
            if name.endswith(ending):
                raise InputError(
                    f"{name}: is quantized as {method}, which MLX does not read; take the "
                    "unquantized checkpoint, or one that was quantized for MLX"
                )
    found = assignments(config, tensors)
    parameters = {parameter.name: parameter for parameter in found}
    missing = sorted(set(expected) - set(parameters))
    extra = sorted(s for name in set(parameters) - set(expected) for s in parameters[name].sources)
    twice = sorted(s for p in found if parameters[p.name] is not p for s in p.sources)
    faults = [f"missing: {listing(missing)}"] if missing else []
    faults += [f"not part of the model: {listing(extra)}"] if extra else []
    faults += [f"stored a second time under another name: {listing(twice)}"] if twice else []
    misfits = sorted(_misfits(parameters, tensors, expected))
    faults += [listing(misfits)] if misfits else []
    if faults:
        raise InputError(
            "the checkpoint's tensors do not fit its config.json: " + "; ".join(faults)
        )
    return [parameters[name] for name in expected]


def assignments(config: Config, tensors: Mapping[str, TensorInfo]) -> list[Parameter]:
    """The parameters that the checkpoint's tensor names and shapes stand for; nothing is proved."""
    found: list[Parameter] = []
    experts: dict[str, dict[int, str]] = {}
    for name, info in tensors.items():
        if match := EXPERT.fullmatch(name):
            path = f"{match[1]}.switch_mlp.{PROJECTIONS[match[3]]}.weight"
            experts.setdefault(path, {})[int(match[2])] = name
        elif (match := FUSED.fullmatch(name)) and len(info.shape) == 3:
            found += _split_fused(match[1], match[2], name)
        elif CONV.fullmatch(name) and info.shape[1:] == (1, config.conv_L_cache):
            found.append(Parameter(name, (name,), "taps"))
        else:
            found.append(Parameter(own_name(config, name), (name,)))
    for path, by_index in experts.items():
        _check_experts(path, by_index, config.num_experts)
        found.append(Parameter(path, tuple(by_index[index] for index in sorted(by_index)), "stack"))
    return found


def _split_fused(path: str, which: str, name: str) -> list[Parameter]:
    mlp = f"{path}.switch_mlp"
    if which == "down_proj":
        return [Parameter(f"{mlp}.down_proj.weight", (name,))]
    return [
        Parameter(f"{mlp}.gate_proj.weight", (name,), "first_half"),
        Parameter(f"{mlp}.up_proj.weight", (name,), "second_half"),
    ]


def _check_experts(path: str, by_index: Mapping[int, str], num_experts: int) -> None:
    wanted, found = set(range(num_experts)), set(by_index)
    faults = [
        f"{what} {listing([str(index) for index in sorted(indices)])}"
        for what, indices in (("lacks", wanted - found), ("has also", found - wanted))
        if indices
    ]
    if faults:
        raise InputError(
            f"the checkpoint's tensors do not fit its config.json: {path} wants experts 0 to "
            f"{num_experts - 1}, and {', '.join(faults)}"
        )


def _misfits(
    parameters: Mapping[str, Parameter],
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, mx.array],
) -> Iterator[str]:
    for name in set(parameters) & set(expected):
        parameter, target = parameters[name], expected[name]
        expected_shape = target.shape[1:] if parameter.how == "stack" else target.shape
        for source in parameter.sources:
            got, dtype = parameter.part_shape(tensors[source].shape), tensors[source].dtype
            if got != expected_shape:
                yield f"{source}: shape {got}, expected {expected_shape}"
            elif not _fits(dtype, target.dtype):
                yield f"{source}: dtype {dtype}, expected {target.dtype}"


def _fits(dtype: str, target: mx.Dtype) -> bool:
    """Whether a tensor of safetensors' `dtype` can fill a parameter: any float a floating one."""
    if mx.issubdtype(target, mx.floating):
        return dtype in FLOATS
    return dtype in PACKED and PACKED[dtype] == target


def cast(name: str, array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """`array` in `dtype` if it is a floating one; expert biases in float32 always."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    if FLOAT32.fullmatch(name):
        return array.astype(mx.float32)
    return array if dtype is None else array.astype(dtype)


def cast_checked(name: str, array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """`cast`, which raises InputError if a narrower dtype cannot hold a value."""
    done = cast(name, array, dtype)
    if done.dtype != array.dtype and done.dtype.size < 4 and not mx.isfinite(done).all().item():
        raise InputError(not_numbers(name, [array], done.dtype))
    return done


def not_numbers(name: str, arrays: Sequence[mx.array], dtype: mx.Dtype) -> str:
    """Why a parameter has a NaN or an infinity in `dtype`, and what to do.

    arrays: what it was cast from, if the cast may have done it
    """
    if not arrays or not all(mx.isfinite(array).all().item() for array in arrays):
        return f"weights with NaN or infinity: {name}; {HEAL}"
    peaks = [mx.abs(array.astype(mx.float32)).max() for array in arrays]
    largest: Any = mx.stack(peaks).max().item()
    kind = str(dtype).rpartition(".")[2]
    return (
        f"{name}: {largest:.3g} is beyond {kind}, which ends at {mx.finfo(dtype).max:.5g}; take "
        "another dtype: bfloat16 or float32"
    )


def own_name(config: Config, name: str) -> str:
    """The model's name of a parameter or module, from the hub's spelling or from mlx-lm's.

    They differ in the dense feed-forward: w1, w2 and w3, or gate_proj, down_proj and up_proj.
    """
    match = DENSE.fullmatch(name)
    if match is None:
        return name
    gate, up, down = config.dense_projections
    names = {"w1": gate, "gate_proj": gate, "w3": up, "up_proj": up, "w2": down, "down_proj": down}
    return f"{match[1]}.{names.get(match[2], match[2])}{match[3]}"


def without_tied_head(
    config: Config, tensors: Mapping[str, TensorInfo], arrays: dict[str, mx.array]
) -> dict[str, TensorInfo]:
    """The tensors without a stored head that repeats the embedding it is tied to.

    Its arrays are dropped from `arrays`. Raises InputError if head and embedding differ: programs
    disagree on which of them counts.
    """
    heads = [name for name in tensors if name.startswith("lm_head.")]
    if not config.tie_word_embeddings or not heads:
        return dict(tensors)
    for name in heads:
        embedding = name.replace("lm_head", "model.embed_tokens")
        same = embedding in tensors and tensors[embedding].shape == tensors[name].shape
        if not same or not mx.array_equal(arrays[name], arrays[embedding]).item():
            raise InputError(
                f"{name} differs from the embedding, and config.json ties the two; set "
                "tie_word_embeddings to false if this head was trained, else remove the tensor"
            )
    for name in heads:
        del arrays[name]
    return {name: info for name, info in tensors.items() if name not in heads}


def bad_values(arrays: Mapping[str, mx.array], names: Sequence[str]) -> list[str]:
    """The names among `names` whose array holds a NaN or an infinity."""
    floats = [name for name in names if mx.issubdtype(arrays[name].dtype, mx.floating)]
    return [name for name in floats if not mx.isfinite(arrays[name]).all().item()]
