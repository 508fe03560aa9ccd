"""A weight matrix as the operations take it: dense, or packed with scales and biases.

One NamedTuple for a projection and for a stack of experts, with its product in MLX operations and
with what a kernel has to know to read it. The kernels' texts are the same for both kinds: they call
`load_vector` and `qdot`, which are MLX's own for packed weights and dense.h's for dense ones.
"""

from typing import NamedTuple

import mlx.core as mx

# By bits: how many packed values make whole bytes, and so how many a lane reads at least.
PACK = {4: 8, 5: 8, 6: 4, 8: 4}
GROUP_SIZES = (32, 64, 128)
SIMD_WIDTH = 32
# Below this many elements MLX passes an array as `constant`, and a `device` pointer cannot have it.
MIN_SIZE = 8


class Matrix(NamedTuple):
    """Weights [..., out, in]; packed ones as `mx.quantize` leaves them."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in], counted in values."""
        *before, width = self.weight.shape
        return (*before, width if self.scales is None else width * 32 // self.bits)

    def times(self, x: mx.array) -> mx.array:
        """x Wᵀ. Shapes: x [..., in], returns [..., out]."""
        if self.scales is None:
            return x @ self.weight.T
        return mx.quantized_matmul(
            *(x, self.weight, self.scales, self.biases),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def chosen_times(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        """Each row of x through the matrix of the stack that its index names.

        Shapes:
            x: [..., 1, in], broadcast against indices · indices: [...], returns [..., 1, out]
        """
        if self.scales is not None:
            return mx.gather_qmm(
                *(x, self.weight, self.scales, self.biases),
                rhs_indices=indices,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
                sorted_indices=sorted_indices,
            )
        transposed = self.weight.swapaxes(-1, -2)
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        if self.weight.dtype == x.dtype and (x.dtype == mx.float32 or on_gpu):
            return mx.gather_mm(x, transposed, rhs_indices=indices, sorted_indices=sorted_indices)
        # The CPU's gathered product knows float32 alone: widen what this call reads, no more.
        wide = x.astype(mx.float32)
        if indices.size < self.weight.shape[0]:
            product = wide @ transposed[indices].astype(mx.float32)
        else:
            product = mx.gather_mm(
                *(wide, transposed.astype(mx.float32)),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return product.astype(x.dtype)

    def refusal(self, dtype: mx.Dtype) -> str | None:
        """Why no kernel can read this matrix for activations of `dtype`, None if one can."""
        if self.weight.size < MIN_SIZE:
            return f"it takes {MIN_SIZE} stored weights or more, got {self.weight.size}"
        if self.scales is None:
            if self.weight.dtype != dtype:
                return f"the weights are {self.weight.dtype}, x is {dtype}"
            if self.shape[-1] < MIN_SIZE:
                return f"it takes {MIN_SIZE} inputs or more, got {self.shape[-1]}"
            return None
        if self.mode != "affine" or self.bits not in PACK or self.group_size not in GROUP_SIZES:
            return (
                "it takes affine weights of 4, 5, 6 or 8 bits in groups of 32, 64 or 128; "
                f"got {self.mode}, {self.bits} bits, groups of {self.group_size}"
            )
        if self.scales.dtype != dtype:
            return f"the scales are {self.scales.dtype}, x is {dtype}"
        return None

    def constants(self, max_packs: int = 2) -> list[tuple[str, int | bool | mx.Dtype]]:
        """Constants by which a kernel reads this matrix.

        W: what is stored, bytes or values · BITS: eighths of it that a value takes · GROUP: values
        sharing a scale · VALUES: how many neighbouring values a lane takes at once · PACKED
        """
        width = self.shape[-1]
        if self.scales is None:
            values = next(count for count in (4, 2, 1) if width % count == 0)
            kind, bits, group_size = self.weight.dtype, 8, values
        else:
            # Two packs at once, as MLX reads, where that leaves no lane idle at the end.
            fits = width % (2 * PACK[self.bits] * SIMD_WIDTH) == 0
            packs = max_packs if fits else 1
            values = PACK[self.bits] * packs
            kind, bits, group_size = mx.uint8, self.bits, self.group_size
        return [
            *(("W", kind), ("BITS", bits), ("GROUP", group_size), ("VALUES", values)),
            ("PACKED", self.scales is not None),
        ]

    def parts(self) -> list[mx.array]:
        """Weight, scales and biases; a dense matrix has its weight in their place, unread."""
        if self.scales is None or self.biases is None:
            return [self.weight] * 3
        return [self.weight, self.scales, self.biases]
