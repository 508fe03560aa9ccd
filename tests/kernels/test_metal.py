"""The policy all doors share, and how a kernel's text is found."""

import mlx.core as mx
import pytest

from lfm_mlx.errors import InputError
from lfm_mlx.kernels import metal


def test_a_kernel_runs_unasked_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "available", lambda: True)
    assert metal.choose("short_conv", None, None)
    assert not metal.choose("short_conv", None, "too long")
    assert not metal.choose("short_conv", False, None)
    with pytest.raises(RuntimeError, match="short_conv: the Metal kernel cannot run: too long"):
        metal.choose("short_conv", True, "too long")


def test_no_kernel_runs_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "available", lambda: False)
    assert not metal.choose("short_conv", None, None)
    with pytest.raises(RuntimeError, match="arrays are not computed by Metal here"):
        metal.choose("short_conv", True, None)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("off", ()),
        ("all", metal.OPERATIONS),
        ("", metal.OPERATIONS),
        ("experts, short_conv", ("experts", "short_conv")),
    ],
)
def test_the_environment_says_which_kernels_run(
    setting: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metal.VARIABLE, setting)
    kernels = metal.chosen()
    assert kernels == frozenset(names)
    for operation in metal.OPERATIONS:
        assert metal.among(kernels, operation) is (None if operation in names else False)


def test_an_argument_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metal.VARIABLE, "short_conv")
    assert metal.chosen(True) == frozenset(metal.OPERATIONS)
    assert metal.chosen(False) == metal.chosen(()) == metal.chosen("off") == metal.NO_KERNELS
    assert metal.chosen(["experts", "projection"]) == metal.chosen("projection,experts")


def test_a_kernel_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metal.VARIABLE, "short_conv,fast")
    with pytest.raises(InputError, match="LFM_MLX_KERNELS is 'short_conv,fast'; expected off"):
        metal.chosen()
    with pytest.raises(InputError, match="kernels are 'fast'; expected off, all, or names"):
        metal.chosen(["fast"])


def test_every_kernel_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def build(name: str, **_: object) -> object:
        built.append(name)
        return object()

    monkeypatch.setattr(mx.fast, "metal_kernel", build)
    first, again, other = (
        metal.kernel("short_conv", name, inputs=("x",), outputs=("y",)) for name in ("a", "a", "b")
    )
    assert first is again
    assert first is not other
    assert built == ["a", "b"]


def test_comments_stay_out_of_what_mlx_hashes() -> None:
    for file in ("short_conv.metal", "router.metal", "dense.h"):
        assert "//" not in metal.text(file)
        assert metal.text(file).strip()


def test_mlx_helpers_are_cut_out_whole() -> None:
    helpers = metal.weight_reader(True)
    assert helpers.count("inline U ") == 2
    assert helpers.count("{") == helpers.count("}")
    assert len(helpers) < 10_000
