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
    """How one matrix is packed: `bits` an element, `group_size` elements sharing a scale."""

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def of(
        cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None
    ) -> "Quantization":
        """A packing with its mode's defaults filled in. Raises InputError when MLX lacks it."""
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
        """What `size` elements take, packed from floats of `itemsize` bytes."""
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
        """How the module at `path` is packed, if its width allows; None: it stays floating."""
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


def pack_modules(
    model: nn.Module, settings: Mapping[str, Any], is_packed: Callable[[str], bool],
    published: Callable[[str], str],
) -> None:  # fmt: skip
    """Replace the modules a quantized checkpoint has packed by their quantized kind.

    settings: config.json's `quantization`: the default and, by path, exceptions to it
    is_packed: whether the checkpoint has scales for a module's path
    published: the checkpoint's name for a path

    Raises InputError for a mode or size MLX lacks, and for settings that name no module.
    """
    widths = packable(model)
    names = {published(path): path for path in widths}
    entries = {key: value for key, value in settings.items() if isinstance(value, (dict, bool))}
    unknown = sorted(set(entries) - set(names) - set(widths))
    if unknown:
        raise InputError(f"config.json: quantization names no module of this model: {unknown[:8]}")
    default = {key: settings[key] for key in ("bits", "group_size", "mode") if key in settings}

    def settings_of(path: str, _: nn.Module) -> bool | dict[str, Any]:
        if path not in widths or not is_packed(path):
            return False
        entry = entries.get(published(path), entries.get(path, True))
        if entry is False:
            return False
        packing = Quantization.of_settings(default if entry is True else entry)
        if widths[path] % packing.group_size:
            raise InputError(
                f"config.json: quantization of {path} has group_size {packing.group_size}; "
                f"expected a divisor of its width {widths[path]}"
            )
        return asdict(packing)

    nn.quantize(model, class_predicate=settings_of)
