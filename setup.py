"""The native build: one static library per op and instruction set, one abi3 extension on torch's stable ABI.

Where nvcc is found, one plain shared library of the CUDA kernels too: it needs no torch, no GPU and no driver to build.
"""

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-wrapv",  # CPython builds with -fwrapv, which costs the kernels up to a fifth
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",  # GCC warns of its own _mm512_undefined_ps
    "-g0",
]


def isa_flags():
    """The flags of each instruction set, by machine: {"x86_64": {"avx2": ["-mavx2", ...], ...}, ...}."""
    machines = {}
    for line in Path("csrc/isa_flags.txt").read_text().splitlines():
        if not line.startswith("#"):
            machine, isa, *flags = line.split()
            machines.setdefault(machine, {})[isa] = flags
    return machines


ISA_FLAGS = isa_flags()
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.[hi]*") if path.suffix in (".h", ".inc"))
CUDA_HEADERS = [path for path in HEADERS if path.startswith("csrc/cuda/")]
SHARES_KERNELS_OF = {
    "encoder_layer": ["bsr_linear"],
    "decoder_layers": ["bsr_linear"],
    "sparse_ffn": ["encoder_layer", "bsr_linear"],
    "dense_attention": ["encoder_layer"],
    "block_sparse_attention": ["encoder_layer"],
    "sparse_conv1d": ["encoder_layer", "bsr_linear"],
    "sparse_gru": ["sparse_lstm"],
}
CUDA_LIBRARY = "sparsenlp.libsparsenlp_cuda"
CUDA_CODE = [
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",  # also runs on 8.6 and 8.9, and newer GPUs translate its PTX
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_100,code=sm_100",
]
OLDEST_NVCC = (12, 8)  # the first that knows sm_100
WITHOUT = "or set SPARSENLP_NATIVE=0 to build without it (every op then runs its slow reference)"


def stop(reason):
    sys.exit(f"\nsparsenlp: {reason}\n")


def native_wanted():
    """Whether to build the extension; stops with one line where it cannot be built."""
    wanted = os.environ.get("SPARSENLP_NATIVE", "1")
    if wanted not in ("0", "1"):
        stop(f"expected SPARSENLP_NATIVE to be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return False
    if not building():
        return True
    if platform.machine() not in ISA_FLAGS:
        stop(f"the extension knows {', '.join(ISA_FLAGS)}, not {platform.machine()}: {WITHOUT}")
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        stop(f"no C++ compiler ({compiler}) was found: install g++ or clang++, {WITHOUT}")
    return True


def building():
    return any(command.startswith(("build", "bdist", "install", "develop", "editable")) for command in sys.argv[1:])


@functools.cache
def nvcc():
    """The path of nvcc; None where there is none, it is too old or is not wanted, and then says so."""
    wanted = os.environ.get("SPARSENLP_CUDA", "1")
    if wanted not in ("0", "1"):
        stop(f"expected SPARSENLP_CUDA to be 0 or 1, got {wanted!r}")
    path = shutil.which(os.environ.get("NVCC") or "nvcc")
    if wanted == "0" or path is None:
        print("sparsenlp: without CUDA kernels:", "SPARSENLP_CUDA=0" if wanted == "0" else "no nvcc was found")
        return None
    output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        print(f"sparsenlp: without CUDA kernels: {path} is older than {'.'.join(map(str, OLDEST_NVCC))}")
        return None
    return path


def torch_directory():
    """The torch of this environment: its headers and libraries are all the build needs, it is never imported.

    pip's build isolation hides it from `import`, but not from the paths of the interpreter.
    """
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    roots += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    root = next((root for root in roots if (root / "include" / "torch" / "csrc" / "stable").is_dir()), None)
    if root is None:
        stop(
            f"the extension is built against the torch it will run with, and found none. Type:\n"
            f"    pip install 'torch>=2.10'\nand try again, {WITHOUT}"
        )
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (root / "version.py").read_text())
    if version is None or tuple(map(int, version.groups())) < (2, 10):
        stop(f"expected torch 2.10 or newer in {root}: upgrade it, {WITHOUT}")
    return root


def headers(op):
    """What the kernels of an op include: a change elsewhere need not compile them again."""
    folders = (op.parent, op, *(op.parent / other for other in SHARES_KERNELS_OF.get(op.name, [])))
    return [path for path in HEADERS if Path(path).parent in folders]


class BuildLibraries(build_clib):
    """One library per op and instruction set, as many at a time as there are CPUs."""

    def build_libraries(self, libraries):
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        build = super().build_libraries
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: build([library]), libraries))


class BuildExtensions(build_ext):
    """The extension as always; the CUDA library by nvcc."""

    def get_ext_filename(self, fullname):
        if CUDA_LIBRARY.endswith(fullname):  # asked for with and without the package
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if ext.name != CUDA_LIBRARY:
            return super().build_extension(ext)
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(os.path.getmtime(path) for path in (*ext.sources, *ext.depends))
        if not self.force and target.exists() and target.stat().st_mtime > newest:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0", *CUDA_CODE]
        if subprocess.run([nvcc(), *flags, "-o", str(target), *ext.sources]).returncode:
            stop("nvcc failed: set SPARSENLP_CUDA=0 to build without CUDA kernels")


def cuda_library():
    sources = sorted(str(path) for path in Path("csrc/cuda").rglob("*.cu"))
    return Extension(CUDA_LIBRARY, sources=sources, depends=[*CUDA_HEADERS, "csrc/cpu/activation.h", "setup.py"])


def native_parts(native, cuda):
    """What `setup` is told of the compiled parts."""
    if not building():
        return {}
    commands = {"build_clib": BuildLibraries, "build_ext": BuildExtensions}
    parts = cpu_parts() if native else {}
    extensions = [*parts.pop("ext_modules", []), *([cuda_library()] if cuda else [])]
    return {"cmdclass": commands, "ext_modules": extensions, **parts} if extensions else {}


def cpu_parts():
    torch = torch_directory()
    libraries = [
        (
            f"sparsenlp_{op.name}_{isa}",
            {
                "sources": [str(op / f"{isa}.cpp")],
                "cflags": [*CXX_FLAGS, *flags],
                "obj_deps": {"": headers(op)},
            },
        )
        for op in sorted(path for path in Path("csrc/cpu").iterdir() if path.is_dir())
        for isa, flags in ISA_FLAGS[platform.machine()].items()
        if (op / f"{isa}.cpp").exists()
    ]
    extension = Extension(
        "sparsenlp._C",
        sources=["csrc/module.cpp", "csrc/cpu/isa.cpp", *sorted(map(str, Path("csrc/ops").glob("*.cpp")))],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch", "torch_cpu"],
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        extra_compile_args=[*CXX_FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        depends=[path for path in HEADERS if path not in CUDA_HEADERS],
        language="c++",
        py_limited_api=True,
    )
    return {
        "libraries": libraries,
        "ext_modules": [extension],
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**native_parts(native_wanted(), building() and nvcc() is not None))
