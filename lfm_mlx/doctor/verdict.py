"""Verdicts on the kernels of this machine, and the setting that leaves some out."""

import statistics
from collections.abc import Collection, Sequence

from lfm_mlx.doctor.measure import DOES_NOT_RUN, NOISE, SLOWER, WRONG, Measurement
from lfm_mlx.kernels import metal


def verdicts(found: Sequence[Measurement]) -> dict[str, list[str]]:
    """Faulty or slow kernels, by verdict."""
    by_kernel = {name: [row for row in found if row.kernel == name] for name in metal.OPERATIONS}
    matters: dict[str, list[str]] = {
        verdict: [
            name for name, rows in by_kernel.items() if any(row.verdict == verdict for row in rows)
        ]
        for verdict in (WRONG, DOES_NOT_RUN)
    }
    return matters | {SLOWER: [name for name, rows in by_kernel.items() if slower(rows)]}


def slower(rows: Sequence[Measurement]) -> bool:
    """Whether a kernel takes longer in decoding: over its cases of one token, by their mean."""
    ratios = [row.ratio for row in rows if row.tokens == 1 and row.ratio is not None]
    return bool(ratios) and statistics.geometric_mean(ratios) > NOISE


def setting_without(left_out: Collection[str]) -> str:
    """The environment's setting with those left out that may run now."""
    kept = [name for name in metal.OPERATIONS if name in metal.chosen() - set(left_out)]
    return f"{metal.VARIABLE}={','.join(kept) or 'off'}"
