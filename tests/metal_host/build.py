"""Compiles Metal text for the host: clang in C++-for-OpenCL mode, results kept by their hash."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx

HERE = Path(__file__).parent
OLDEST_CLANG = 19
NATIVE = [
    "-fPIC",
    "-mcpu=native" if platform.machine() == "aarch64" else "-march=native",
    "-Wno-invalid-feature-combination",
]
# No contraction and no excess precision: every operation is rounded once, to its own type.
METAL = [
    *["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc"],
    *["-cl-single-precision-constant", "-ffp-contract=off"],
    *["-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"],
    *["-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"],
    *["-fvisibility=hidden", "-gline-tables-only", "-I", str(HERE)],
    # Metal takes no float where a bfloat stands; the other two are never meant.
    *["-Werror=implicit-float-conversion", "-Wno-implicit-int-float-conversion"],
    *["-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Wno-unknown-attributes"],
]
# The two flavours start local variables differently, so that a use of one that was never set makes
# their outputs differ. The checked one calls memory.cpp before each access to memory.
FLAVOURS = {
    "fast": ["-O2", "-ftrivial-auto-var-init=zero"],
    "checked": [
        *["-O1", "-ftrivial-auto-var-init=pattern", "-fsanitize=thread"],
        "-fsanitize=alignment,array-bounds,local-bounds,bool,float-cast-overflow,"
        "integer-divide-by-zero,signed-integer-overflow",
        *["-fno-sanitize-trap=all", "-fsanitize-recover=all"],
        *["-mllvm", "-tsan-instrument-func-entry-exit=0"],
        *["-mllvm", "-tsan-instrument-read-before-write=1"],
    ],
}


BEGIN = r"((?:\A|[;{}\n])\s*)"  # of a statement
SCALAR = "bool|float|half|bfloat|u?(?:char|short|int|long)"
VECTOR = r"(?:float|half|bfloat|u?(?:char|short|int|long))[234]|vec<\w+, ?\d>"


class CompileError(RuntimeError):
    """Text that is no Metal, with clang's words about it."""


@functools.cache
def clang() -> str | None:
    """A clang that is new enough, or None."""
    for name in (*(f"clang-{v}" for v in range(OLDEST_CLANG + 5, OLDEST_CLANG - 1, -1)), "clang"):
        if shutil.which(name):
            said = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"clang version (\d+)", said)
            if version and int(version[1]) >= OLDEST_CLANG and "Apple" not in said:
                return name
    return None


def refusal() -> str | None:
    """Why Metal kernels cannot run on this host, or None where they can."""
    if platform.system() != "Linux":
        return "Metal kernels run on a host under Linux only"
    if clang() is None:
        return f"Metal kernels need clang {OLDEST_CLANG} or newer to run on a host"
    return None


def available() -> bool:
    """Whether Metal kernels can run on this host."""
    return refusal() is None


def library(text: str, flavour: str) -> Path:
    """The shared library of a kernel's text, compiled now or before."""
    if bare := unqualified_pointer(text):
        raise CompileError(
            f"`{bare}` has no address space; write device, constant, threadgroup or thread"
        )
    source = f'#include "shim.h"\n#include "{_prelude().name}"\n{rewritten(text)}'
    command = [*METAL, *FLAVOURS[flavour], "-I", str(_prelude().parent)]
    target = _cached(source, command, ".so")
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            code, thing = Path(folder, "kernel.cl"), Path(folder, "kernel.o")
            code.write_text(source, encoding="utf-8")
            _clang([*NATIVE, *command, "-c", str(code), "-o", str(thing)])
            _link([str(thing), str(runtime()), f"-Wl,-rpath,{target.parent}"], target)
    return target


@functools.cache
def runtime() -> Path:
    """The library in which every kernel runs."""
    files = [HERE / "threads.cpp", HERE / "memory.cpp"]
    # Integers wrap, as in Metal; longjmp leaves stacks that a fortified one would not know.
    command = ["-std=c++17", "-O2", "-fwrapv", "-U_FORTIFY_SOURCE"]
    text = "".join(f.read_text(encoding="utf-8") for f in [*files, HERE / "runtime.h"])
    target = _cached(text, command, ".runtime.so")
    if not target.exists():
        _link([*NATIVE, *command, *map(str, files)], target)
    return target


def rewritten(text: str) -> str:
    """Metal text as C++ for OpenCL. Line numbers stay.

    What is written differently there: includes, function constants, constants inside a function,
    variables in threadgroup memory, and vectors made of parts.
    """
    text = re.sub(r"^[ \t]*#include <metal_\w+>", "", text, flags=re.M)
    text = re.sub(
        r"\bconstant (\w+ \w+) \[\[function_constant\(\d+\)\]\]", r"constant \1 = 0", text
    )
    text = re.sub(rf"{BEGIN}((?:const |constexpr )*constant [^;(){{}}*&]*=)", r"\1static \2", text)
    text = re.sub(
        rf"{BEGIN}threadgroup\s+(\w+(?:<[^;<>]*>)?)\s+(\w+\s*(?:[\[,][^;=]*)?);",
        lambda m: m[1] + _threadgroup_variables(m[2], m[3]),
        text,
    )
    return re.sub(
        rf"(?<![\w:])((?:metal::)?(?:{VECTOR}))\((?!\))", r"metal::make_vector<\1>(", text
    )


def unqualified_pointer(text: str) -> str | None:
    """A pointer without an address space: Metal refuses it, C++ for OpenCL does not."""
    found = re.search(
        r"(?<!device )(?<!thread )(?<!constant )(?<!threadgroup )(?<!const )\b"
        rf"(?:const )?(?:T|U|float|(?:bfloat16|float16|u?int\d+)_t|{SCALAR}|{VECTOR})\s*[*&]+ ?\w*",
        re.sub(r"//.*", "", text),
    )
    return found and found[0]


def _threadgroup_variables(element: str, names: str) -> str:
    found = re.findall(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)(?:,|$)", names)
    return " ".join(f"THREADGROUP_VARIABLE({n}, {element}{size.strip()});" for n, size in found)


@functools.cache
def _prelude() -> Path:
    """What MLX puts before every kernel, from the headers of the installed package, in one file.

    Without bf16_math.h, which hands bfloat16 to functions inside Metal's compiler; shim.h has its
    own.
    """
    include = next(p for p in Path(mx.__file__).parents if (p / "include").is_dir()) / "include"
    seen = {"mlx/backend/metal/kernels/bf16_math.h"}

    def inlined(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (include / name).read_text(encoding="utf-8")
        return re.sub(r'^#include "(.*)"', lambda m: inlined(m[1]), text, flags=re.M)

    text = "#pragma clang system_header\n" + inlined("mlx/backend/metal/kernels/utils.h")
    target = _cached(text, [], ".h")
    if not target.exists():
        # Under a name of its own first: a process beside this one may be compiling with it.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder, target.name)
            made.write_text(rewritten(text), encoding="utf-8")
            made.replace(target)
    return target


def _cached(text: str, command: list[str], suffix: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lfm_mlx" / "metal_host"
    root.mkdir(parents=True, exist_ok=True)
    ours = [
        f.read_text(encoding="utf-8") for f in (HERE / "shim.h", HERE / "abi.h", HERE / "build.py")
    ]
    parts = [text, *command, *ours, clang() or "", platform.processor()]
    return root / (hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24] + suffix)


def _link(what: list[str], target: Path) -> None:
    # To a name of its own first: another process may be making the same one.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        _clang(
            ["--driver-mode=g++", "-shared", f"-Wl,-soname,{target.name}", *what, "-o", str(made)]
        )
        made.replace(target)


def _clang(arguments: list[str]) -> None:
    program = clang()
    assert program, "asked to compile where refusal() gives a reason not to"
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
