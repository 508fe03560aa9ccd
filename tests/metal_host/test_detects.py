"""Every check finds its bug, and finds nothing in the same kernel without the bug."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from metal_host import CompileError, KernelError, available, metal_kernel, refusal

pytestmark = pytest.mark.skipif(not available(), reason=str(refusal()))

THREADS = 64
NAMES = """
    uint i = thread_position_in_grid.x, t = thread_position_in_threadgroup.x;
    uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
"""
BLOCKS = re.findall(
    r"^(\w+): (.*)\n((?:.+\n)+)", Path(__file__).with_name("bugs.metal").read_text(), flags=re.M
)


def run(name: str, body: str) -> None:
    kernel = metal_kernel(name, ["x"], ["y"], NAMES + body)
    kernel(
        inputs=[mx.arange(THREADS).astype(mx.float32)],
        output_shapes=[(THREADS,)],
        output_dtypes=[mx.float32],
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS // 2 if "between_threadgroups" in name else THREADS, 1, 1),
    )


@pytest.mark.parametrize(("name", "said", "body"), BLOCKS, ids=[name for name, _, _ in BLOCKS])
def test_bug_is_found(name: str, said: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metal_host.kernel.SECONDS", 1)
    run(name, re.sub(r"\{\{.*? :: (.*?)\}\}", r"\1", body))
    error = CompileError if name.startswith("refused") else KernelError
    with pytest.raises(error, match=said):
        run(name, re.sub(r"\{\{(.*?) :: .*?\}\}", r"\1", body))
