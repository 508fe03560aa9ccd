"""The doctor's cases have the shapes of LFM2.5-8B-A1B."""

from lfm_mlx.doctor.cases import Sizes, real_sizes


def test_the_sizes_are_those_of_the_real_model() -> None:
    assert real_sizes() == Sizes(
        hidden=2048, dense=7168, expert=1792, experts=32, chosen=4, heads=32, kv_heads=8,
        head_dim=64, taps=3, vocab=128_000, rope_theta=5e6, tokens=(1, 8), prompt=512,
    )  # fmt: skip
