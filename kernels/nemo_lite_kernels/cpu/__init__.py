"""C++ kernels for CPUs, compiled on first use into a cache and called through ctypes.

One source is compiled for a *level* of the instruction set: ``portable``, ``avx2``, ``avx512`` (with VNNI) or
``avx512_bf16``. The best level that this machine has is taken. The library uses the OpenMP runtime that torch has
loaded; it does not depend on torch's headers or ABI. Without a compiler :func:`reason` says so, and the references run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")), "-mprefer-vector-width=512"]
# Level -> compiler flags, and what /proc/cpuinfo must list.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
LEVELS: dict[str, tuple[list[str], set[str]]] = {
    "avx512_bf16": ([*AVX512, "-mavx512bf16"], _AVX512 | {"avx512_bf16"}),
    "avx512": (AVX512, _AVX512),
    "avx2": (AVX2, {"avx2", "fma", "f16c"}),
    "portable": ([], set()),
}  # fmt: skip
MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")
SANITIZERS = {
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer", "-O1", "-g"],
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"],
}


class BuildError(RuntimeError):
    """Why the kernels could not be compiled or loaded, in one sentence."""


@functools.cache
def levels() -> tuple[str, ...]:
    """The levels this machine can run, best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
    return tuple(level for level, (_, needed) in LEVELS.items() if needed <= flags)


def _compiler() -> list[str]:
    asked = os.environ.get("CXX")
    for name in (shlex.split(asked),) if asked else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(name[0]):
            return name
    raise BuildError(f"the compiler {asked!r} (CXX) was not found" if asked else "no C++ compiler (c++, g++, clang++)")


def unavailable() -> str | None:
    """Why there is nothing to build here, a CPU the kernels are not written for or no compiler, or None."""
    if platform.machine() not in MACHINES:
        return f"not written for {platform.machine()}"
    try:
        _compiler()
    except BuildError as error:
        return str(error)
    return None


def _openmp() -> list[str]:
    """Linker arguments for the OpenMP runtime that is loaded already: torch's."""
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    with open("/proc/self/maps") as maps:
        files = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    runtimes = sorted(file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp")))
    return runtimes[:1]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        line = next((line for line in lines if "error" in line), lines[-1])
        raise BuildError(f"{command[0]} failed: {line}")
    return done.stdout


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_lite" / "kernels"


def build(level: str, sanitize: str | None = None) -> Path:
    """The shared library of a level, compiled unless the cache has it. Raises BuildError."""
    compiler = _compiler()
    version = _run([*compiler, "--version"]).splitlines()[0]
    openmp = _openmp()
    flags = [*FLAGS, *LEVELS[level][0], *(["-fopenmp"] if openmp and sys.platform != "darwin" else [])]
    flags += SANITIZERS[sanitize] if sanitize else []
    sources = sorted(HERE.glob("*.cpp"))
    stamp = hashlib.sha256(repr((version, flags, openmp, platform.machine())).encode())
    for file in (*sources, *sorted(HERE.glob("*.h"))):
        stamp.update(file.name.encode() + file.read_bytes())
    target = _cache() / f"{level}{'-' + sanitize if sanitize else ''}-{stamp.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _Lock(target.with_suffix(".lock")):
            if not target.exists():
                print(f"nemo_lite: compiling the CPU kernels for {level} with {version}, once", file=sys.stderr)
                start = time.perf_counter()
                _compile(compiler, flags, openmp, sources, target, sanitize)
                print(f"nemo_lite: {time.perf_counter() - start:.0f} s; kept in {target}", file=sys.stderr)
    except OSError as error:
        raise BuildError(f"the cache {target.parent} cannot be written: {error}") from error
    return target


def _compile(compiler, flags, openmp, sources, target: Path, sanitize) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            jobs = [
                pool.submit(_run, [*compiler, *flags, "-c", str(source), "-o", obj])
                for source, obj in zip(sources, objects)
            ]
            for job in jobs:
                job.result()
        out = f"{folder}/kernels.so"
        _run([*compiler, "-shared", *(SANITIZERS[sanitize][:1] if sanitize else []), *objects, "-o", out, *openmp])
        os.replace(out, target)


class _Lock:
    """One process compiles, the others wait."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        import fcntl

        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


@functools.cache
def _loaded(level: str | None, sanitize: str | None) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        if (why := unavailable()) is not None:
            raise BuildError(why)
        return ctypes.CDLL(str(build(level or levels()[0], sanitize)))
    except (BuildError, OSError) as error:
        print(f"nemo_lite: without the C++ kernels, which are faster: {error}", file=sys.stderr)
        return str(error)


_variant: tuple[str | None, str | None] = (None, None)


def use(level: str | None = None, sanitize: str | None = None) -> None:
    """Take another level or a sanitised build from now on: for tests and benchmarks."""
    global _variant
    _variant = (level, sanitize)
    found = _loaded(*_variant)
    if isinstance(found, str):
        raise BuildError(found)


def reason() -> str | None:
    """Why the C++ kernels cannot be used here, or None. The first call compiles them where the cache is empty."""
    found = _loaded(*_variant)
    return found if isinstance(found, str) else None


def lib() -> ctypes.CDLL:
    """The loaded library. Raises BuildError where :func:`reason` says why there is none."""
    found = _loaded(*_variant)
    if isinstance(found, str):
        raise BuildError(found)
    return found


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Kernel:
    """A function of the library. `signature` has a letter an argument: p a tensor (or None), i an integer, f a float;
    the number of torch's threads follows them. ``kernel[dtype]`` is the one whose name ends in the dtype's suffix."""

    def __init__(self, name: str, signature: str):
        self.name, self.types = name, [*(_TYPES[letter] for letter in signature), ctypes.c_int64]
        self._found: dict = {}

    def __getitem__(self, dtype: torch.dtype):
        return self._call(f"{self.name}_{SUFFIX[dtype]}")

    def __call__(self, *args):
        return self._call(self.name)(*args)

    def _call(self, name: str):
        library = lib()
        key = (id(library), name)
        if key not in self._found:
            function = getattr(library, name)
            function.argtypes, function.restype = self.types, None

            def call(*args):
                function(*[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args], torch.get_num_threads())

            self._found[key] = call
        return self._found[key]
