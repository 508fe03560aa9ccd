"""Quantization recipes as a table: path pattern → bits, group size and mode.

A recipe says how each projection and the embedding are packed; the router's gate and the expert
biases are never packed by a recipe of ours, because a flipped expert costs more than they weigh.
Norms and convolution taps are not matrices and stay as they are.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from lfm_mlx.checkpoint.folder import TensorInfo
from lfm_mlx.errors import InputError

# Per mode: its bits and its group sizes, the default first.
MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
NEVER = (r".*\.feed_forward\.gate",)


@dataclass(frozen=True)
class Quantization:
    """Quantization of one matrix: `bits` an element, `group_size` elements sharing a scale."""

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def of(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> "Quantization":
        """A packing with its mode's defaults filled in. Raises InputError if MLX lacks it."""
        if not isinstance(mode, str) or mode not in MODES:
            raise InputError(f"quantization mode is {mode!r}; supported: {', '.join(MODES)}")
        accepted_bits, accepted_groups = MODES[mode]
        packing = cls(
            accepted_bits[0] if bits is None else bits,
            accepted_groups[0] if group_size is None else group_size,
            mode,
        )
        for what, value, accepted in (
            ("bits", packing.bits, accepted_bits),
            ("group size", packing.group_size, accepted_groups),
        ):
            if type(value) is not int or value not in accepted:
                known = ", ".join(str(number) for number in sorted(accepted))
                raise InputError(f"{what} is {value!r} in mode {mode}; supported: {known}")
        return packing

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "Quantization":
        """The packing that an entry of config.json's `quantization` asks for."""
        unknown = sorted(set(settings) - {"mode", "bits", "group_size"})
        if unknown:
            raise InputError(
                f"config.json: quantization has {unknown[0]!r}: {settings[unknown[0]]!r}; "
                "supported: bits, group_size and mode"
            )
        return cls.of(**settings)

    def pack(
        self, weight: mx.array, stream: mx.Stream | mx.Device | None = None
    ) -> dict[str, mx.array]:
        """The packed parts of `weight` [..., out, in]: weight, scales and, if affine, biases."""
        parts = mx.quantize(weight, self.group_size, self.bits, mode=self.mode, stream=stream)
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))

    def nbytes(self, size: int, itemsize: int) -> int:
        """Bytes of `size` elements, quantized from floats of `itemsize` bytes."""
        shared = 2 * itemsize if self.mode == "affine" else 1  # scale and bias, or an 8-bit scale
        return size * self.bits // 8 + size // self.group_size * shared


@dataclass(frozen=True)
class Recipe:
    """A default packing, and the patterns (full match on a module's path) that override it.

    A rule's packing of None leaves the module in floating point. The first rule that matches wins.
    """

    default: Quantization
    rules: tuple[tuple[str, Quantization | None], ...] = ()

    def packing(self, path: str) -> Quantization | None:
        """Quantization of the module at `path`; None if it stays floating."""
        rules = (*((pattern, None) for pattern in NEVER), *self.rules)
        return next((p for pattern, p in rules if re.fullmatch(pattern, path)), self.default)

    def packings(self, widths: Mapping[str, int]) -> tuple[dict[str, Quantization], list[str]]:
        """The packing of every module that gets one, and the modules whose width forbids theirs.

        widths: by path, the inputs of each module that can be packed
        """
        wanted = {path: packing for path in widths if (packing := self.packing(path))}
        odd = [path for path, packing in wanted.items() if widths[path] % packing.group_size]
        return {path: packing for path, packing in wanted.items() if path not in odd}, odd


def packable(model: nn.Module) -> dict[str, int]:
    """The modules that can be packed: by path, how many inputs each has."""
    modules = model.named_modules()
    return {path: m["weight"].shape[-1] for path, m in modules if hasattr(m, "to_quantized")}


@dataclass(frozen=True)
class Stored:
    """One quantized matrix in a checkpoint: its words, and the scales of their groups."""

    weight: TensorInfo
    scales: TensorInfo

    def packing(self, path: str, width: int) -> Quantization:
        """The packing that the shapes tell, of a matrix with `width` inputs.

        Raises InputError if MLX has none of that kind.
        """
        groups, words = self.scales.shape[-1], self.weight.shape[-1]
        # Affine scales are floats; every other mode has scales of 8 bits, and one size of its own.
        modes = [mode for mode in MODES if (mode == "affine") == (self.scales.dtype != "U8")]
        if groups and width % groups == 0 and 32 * words % width == 0:
            bits, group_size = 32 * words // width, width // groups
            for mode in modes:
                if bits in MODES[mode][0] and group_size in MODES[mode][1]:
                    return Quantization(bits, group_size, mode)
        raise InputError(
            f"{path}: {words} words and {groups} scales for {width} inputs are no quantization "
            "that MLX has; download the checkpoint again, or convert the original"
        )


def pack_modules(
    model: nn.Module, settings: Mapping[str, Any] | None, stored: Mapping[str, Stored],
    own_name: Callable[[str], str],
) -> dict[str, Quantization]:  # fmt: skip
    """Replace the modules that the checkpoint has packed by their quantized kind; returns how.

    What config.json does not name is inferred from the shapes, as mlx-lm does.

    settings: config.json's `quantization`: a default and, by path, exceptions to it
    stored: by the model's paths, what the checkpoint has packed
    own_name: the model's path for one of config.json

    Raises InputError for a mode or size MLX lacks, and for settings that name no module.
    """
    settings = settings or {}
    widths = packable(model)
    entries = {key: value for key, value in settings.items() if isinstance(value, (dict, bool))}
    unknown = sorted(key for key in entries if own_name(key) not in widths)
    if unknown:
        raise InputError(f"config.json: quantization names no module of this model: {unknown[:8]}")
    entries = {own_name(key): value for key, value in entries.items()}
    default = {key: settings[key] for key in ("bits", "group_size", "mode") if key in settings}
    if default:
        Quantization.of_settings(default)
    packings: dict[str, Quantization] = {}
    for path in [path for path in widths if path in stored and entries.get(path) is not False]:
        entry = default if entries.get(path) is True else entries.get(path)
        if isinstance(entry, Mapping):
            packings[path] = Quantization.of_settings(entry)
        else:
            packings[path] = stored[path].packing(path, widths[path])
        if widths[path] % packings[path].group_size:
            raise InputError(
                f"config.json: quantization of {path} has group_size {packings[path].group_size}; "
                f"expected a divisor of its width {widths[path]}"
            )

    def settings_of(path: str, _: nn.Module) -> bool | dict[str, Any]:
        return asdict(packings[path]) if path in packings else False

    nn.quantize(model, class_predicate=settings_of)
    return packings
