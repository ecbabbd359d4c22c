"""The definition of the package for pip: its packages and folders, its requirements, and the build of the extension.

The extension mimae._C (csrc/) is built if torch can be imported: with `pip install --no-build-isolation`, or in a
checkout by `python setup.py build_ext --inplace`. MIMAE_CUDA=1 also builds its CUDA part, which needs nvcc. Its part
for JPEGs needs libjpeg-turbo and its header (Debian: libjpeg62-turbo-dev, Fedora: libjpeg-turbo-devel). If a part
cannot be built, one line reports the reason. Without it the program is slower, and nothing else changes.
"""

import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

here = Path(__file__).parent

# In the repository these folders are next to mimae/; when installed they are packages inside it. In a checkout relative
# links (mimae/kernels -> ../kernels) have the same effect. An sdist has no links, so the names are explicit.
MAPPED = ("kernels", "bench", "configs")

packages = find_packages(include=["mimae", "mimae.*"], exclude=[f"mimae.{name}*" for name in MAPPED])
package_dir = {}
for name in MAPPED:
    packages += [f"mimae.{name}"] + [f"mimae.{name}.{inner}" for inner in find_packages(name)]
    package_dir[f"mimae.{name}"] = name

OLDEST_TORCH = (2, 11)
DALI = "nvidia-dali-cuda130 ; sys_platform == 'linux'"
DOCS = ("mkdocs-material", "mkdocstrings[python]")
GPUS = (80, 90, 100)
torch = find_spec("torch")
# One wheel serves all versions of Python. Free-threaded builds of Python cannot load such a wheel.
limited = bool(torch) and not sysconfig.get_config_var("Py_GIL_DISABLED")
extension = Extension("mimae._C", ["csrc/orthogonal_masks.cpp", "csrc/jpeg.cpp"], py_limited_api=limited, optional=True)


class BuildNative(build_ext):
    """Build the extension by one call of the C++ compiler or of nvcc, with torch's stable ABI."""

    def run(self):
        if self.inplace:  # If the build fails, no older extension may remain.
            for built in here.glob("mimae/_C.*"):
                built.unlink()
        super().run()

    def build_extension(self, extension):
        built = Path(self.get_ext_fullpath(extension.name))
        built.parent.mkdir(parents=True, exist_ok=True)
        built.unlink(missing_ok=True)
        self.jpeg, lacking = self.find_libjpeg()
        wanted = {"mimae._C": self.cxx}
        if os.environ.get("MIMAE_CUDA") == "1":
            wanted = {"the CUDA part of mimae._C": self.nvcc, **wanted}
        for part, compiler in wanted.items():
            obstacle = self.call([*compiler(), "-o", str(built)])
            if obstacle is None:
                if lacking is not None:
                    print(f"mimae: mimae._C has no part for JPEGs ({lacking}): decoding is slower")
                return
            print(f"mimae: {part} was not built ({obstacle}): ops are slower, and nothing else changes")

    def find_libjpeg(self):
        """Return the source and the library of the part for JPEGs, or an empty list and the reason of the failure.

        A static library is preferred, so that a wheel does not depend on the libraries of the machine that runs it.
        """
        source = str(here / "csrc/jpeg.cpp")
        compiler = [*self.compiler_words(), "-fPIC", "-shared", "-std=c++17", source]
        try:
            asked = [*self.compiler_words(), "-print-file-name=libjpeg.a"]
            static = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        except OSError:
            return [], f"no {self.compiler_words()[0]}"
        obstacle = None
        for library in ([static] if os.path.isabs(static) else []) + ["-ljpeg"]:
            linked = [library, "-Xlinker", "--exclude-libs=ALL"]
            with tempfile.TemporaryDirectory() as folder:
                # Otherwise undefined symbols would be found only when the extension is loaded.
                checked = ["-Xlinker", "--no-undefined", "-o", f"{folder}/jpeg.so"]
                obstacle = self.call([*compiler, *linked, *checked], "jpeg.log")
            if obstacle is None:
                return [source, *linked], None
        return [], obstacle

    def compiler_words(self):
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]

    def cxx(self):
        sources = [str(here / "csrc/orthogonal_masks.cpp"), *self.jpeg]
        return [*self.compiler_words(), "-fPIC", "-fvisibility=hidden", *sources, *self.common()]

    def nvcc(self):
        home = os.environ.get("CUDA_HOME")
        # CXX may be `ccache g++ -m64`, but nvcc accepts only the compiler.
        words = [word for word in shlex.split(os.environ.get("CXX", "")) if not word.startswith("-")]
        host = ["-ccbin", words[-1]] if words else []
        targets = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
        # GPUs that are newer than all of these compile the last one's instructions when the extension is loaded.
        targets += [f"-gencode=arch=compute_{GPUS[-1]},code=compute_{GPUS[-1]}"]
        return [
            *(f"{home}/bin/nvcc" if home else "nvcc", *host, *targets, "-Xcompiler=-fPIC,-fvisibility=hidden"),
            *("-cudart=shared", "-DMIMAE_CUDA", "-DUSE_CUDA"),
            *(str(here / "csrc" / name) for name in ("orthogonal_masks.cpp", "orthogonal_masks.cu")),
            *(*self.jpeg, *self.common(), "-ltorch_cuda"),
        ]

    def common(self):
        (home,) = torch.submodule_search_locations
        target = OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48
        return [
            *("-shared", "-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={target}ULL", "-isystem", f"{home}/include"),
            # With this an older torch refuses to load the extension, instead of crashing when a missing function is
            # used.
            *("-Xlinker", "-z", "-Xlinker", "now", f"-L{home}/lib", "-ltorch_cpu"),
        ]

    def call(self, command, name="native.log"):
        """Run a compiler, write its output to a log file, and return the reason of a failure, or None."""
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError:
            return f"no {command[0]}"
        log = here / "build" / name
        log.parent.mkdir(exist_ok=True)
        log.write_text(f"{shlex.join(command)}\n{done.stdout}")
        return f"{command[0]} failed, see {log}" if done.returncode else None


setup(
    name="mimae",
    version=re.search(r'^__version__ = "(.+)"$', (here / "mimae/__init__.py").read_text(), re.M)[1],
    description="MI-MAE: masked autoencoders that learn mask-invariant mutual information",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The mimae contributors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # Worker processes end when their parent process changes; from Python 3.14 on a fork server would be the parent.
    python_requires=">=3.11,<3.14",
    packages=packages,
    package_dir=package_dir,
    ext_modules=[extension] if torch else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
    package_data={
        "mimae": ["py.typed"],
        "mimae.kernels": ["py.typed"],
        "mimae.bench.controls": ["*.yaml"],
        "mimae.configs": ["*.yaml"],
        "mimae.report": ["page.css", "page.js"],
    },
    entry_points={"console_scripts": ["mimae = mimae.cli:main"]},
    install_requires=[
        f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}",
        "torchvision",
        "timm>=1.0.20",
        "numpy>=2",
        "Pillow>=11",
        "simplejpeg",
        "pydantic>=2",
        "PyYAML",
        "typer",
        "rich",
        "tensorboard",
        "matplotlib",
        "scikit-image",
    ],
    extras_require={
        "deepspeed": ["deepspeed"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "build",
            "scikit-learn",
            "deepspeed",
            "transformers",
            "pyarrow",
            "submitit",
            "wandb",
            "mlflow-skinny",
            "faster-coco-eval",
            "pycocotools",
            "torchmetrics",
            "onnx",
            "onnxscript",
            "onnxruntime",
            DALI,
            *DOCS,
        ],
        "docs": [*DOCS],
        "peers": ["transformers", "lightly"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "transformers": ["transformers"],
        "detect": ["faster-coco-eval"],
        "parquet": ["pyarrow"],
        "dali": [DALI],
        "slurm": ["submitit"],
        "track": ["wandb", "mlflow-skinny"],
        "gpu": ["nvidia-ml-py"],
    },
)
