"""How much memory there is, whether a run fits, and how much one took."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from lfm_mlx import device
from lfm_mlx.errors import InputError
from lfm_mlx.kernels import metal

on_cpu = pytest.mark.skipif(metal.available(), reason="measures the process, not Metal")


@on_cpu
def test_device_bytes_is_the_machines_memory() -> None:
    pages = os.sysconf("SC_PHYS_PAGES")
    assert device.device_bytes() == pages * os.sysconf("SC_PAGE_SIZE")
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = next(line for line in lines if line.startswith("MemTotal:"))
        assert device.device_bytes() == int(total.split()[1]) * 1024


@on_cpu
def test_peak_is_in_bytes_and_stays_when_memory_is_given_back() -> None:
    code = (
        "from lfm_mlx import device\n"
        "before = device.peak_bytes()\n"
        "held = bytearray(b'x') * 300_000_000\n"
        "during = device.peak_bytes()\n"
        "del held\n"
        "print(before, during, device.peak_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    before, during, after = map(int, done.stdout.split())
    assert 20e6 < before < 300e6
    assert during - before == pytest.approx(300e6, rel=0.1)
    assert after >= 0.99 * during  # the kernel counts pages in batches


def test_peak_of_this_process() -> None:
    assert device.peak_bytes() > 0


def test_room_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 5_000_000_000 + 1_500_000_000 + device.WORKING_BYTES
    monkeypatch.setattr(device, "device_bytes", lambda: needed)
    device.require_room(5_000_000_000, 1_500_000_000, 128000)
    monkeypatch.setattr(device, "device_bytes", lambda: needed - 1)
    with pytest.raises(InputError) as caught:
        device.require_room(5_000_000_000, 1_500_000_000, 128000)
    message = str(caught.value)
    assert message.startswith(
        "needs 7.0 GB (weights 5.0, cache of 128000 tokens 1.5), and the device has 7.0 GB; "
    )
    assert "fewer bits" in message
    assert "or force to try" in message
    assert "\n" not in message


@on_cpu
def test_wired_limit_is_left_alone_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("called"))
    with device.wired_limit():
        pass


def test_wired_limit_is_set_and_put_back_even_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [111]

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(metal, "available", lambda: True)
    monkeypatch.setattr(device, "device_bytes", lambda: 999)
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    seen: list[int] = []

    def fail() -> None:
        with device.wired_limit():
            seen.extend(limits)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [111, 999]
    assert limits == [111, 999, 111]
