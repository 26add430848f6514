"""Build the C++ extension where it can be built; everything else stands in pyproject.toml.

It needs a C++17 compiler (GCC or Clang) and the headers of torch >= 2.10, looked for without
importing torch; else the package is pure Python. One build serves every later Python and torch.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(map(str, Path("csrc").rglob("*.cpp")))
# The GNU dialect, because there a * b + c may become one rounding; nothing else is relaxed.
FLAGS = ["-std=gnu++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]
# Nothing that torch 2.10 lacks is used: its headers hide what is newer.
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]


def find_torch() -> Path | None:
    """Return the folder of a torch whose headers have the stable ABI."""
    spec = find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    # Build isolation hides the environment that is installed into; its folder still has a name.
    found += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    header = Path("include/torch/csrc/stable/library.h")
    return next((folder for folder in found if (folder / header).is_file()), None)


class BuildWithNinja(build_ext):
    """Compile in parallel, and only what changed, where ninja is here."""

    def build_extension(self, ext: Extension) -> None:
        """Let ninja make the objects and setuptools link them."""
        ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
        if not find_spec("ninja") and not shutil.which("ninja"):
            return super().build_extension(ext)
        cxx = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)
        words = [*cxx, *FLAGS, *(f"-D{k}" + (f"={v}" if v else "") for k, v in DEFINES)]
        words += [f"-I{folder}" for folder in ext.include_dirs]
        folder = Path(self.build_temp).resolve()
        rules = [f"rule cxx\n  command = {' '.join(words)} -MD -MF $out.d -c $in -o $out"]
        rules.append("  depfile = $out.d\n  deps = gcc")
        objects = {source: f"{folder / Path(source).stem}.o" for source in ext.sources}
        rules += [f"build {out}: cxx {Path(source).resolve()}" for source, out in objects.items()]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(rules) + "\n")
        subprocess.run([*ninja, "-C", str(folder)], check=True)
        ext.sources, ext.extra_objects = [], list(objects.values())
        # setuptools would leave a library alone that is newer than the headers, whatever objects
        # and flags it was made of.
        self.force = True
        return super().build_extension(ext)


torch = find_torch()
compiler = shutil.which(os.environ.get("CXX", sysconfig.get_config_var("CXX") or "c++").split()[0])
buildable = bool(torch and compiler) and sys.platform != "win32"
if not buildable:
    sys.stderr.write(f"loft_kernels without C++: torch's headers {torch}, compiler {compiler}\n")
native = Extension(
    "loft_kernels._native",
    SOURCES,
    depends=sorted(map(str, Path("csrc").rglob("*.h"))),
    include_dirs=[str(torch / "include")] if torch else [],
    library_dirs=[str(torch / "lib")] if torch else [],
    libraries=["torch_cpu"],
    define_macros=DEFINES,
    extra_compile_args=FLAGS,
    language="c++",
    py_limited_api=True,
)
setup(
    ext_modules=[native] if buildable or "sdist" in sys.argv else [],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
