"""What `pip install` reads: the packages, their folders, their requirements."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

# These folders lie beside mimae/ in the repository and are packages inside it once installed; relative links
# (mimae/kernels -> ../kernels) give a checkout the same view. An sdist has none, hence the explicit names.
MAPPED = ("kernels", "bench", "configs")

packages = find_packages(include=["mimae", "mimae.*"], exclude=[f"mimae.{name}*" for name in MAPPED])
package_dir = {}
for name in MAPPED:
    packages += [f"mimae.{name}"] + [f"mimae.{name}.{inner}" for inner in find_packages(name)]
    package_dir[f"mimae.{name}"] = name

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
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "mimae": ["py.typed"],
        "mimae.kernels": ["py.typed"],
        "mimae.bench": ["*.yaml"],
        "mimae.configs": ["*.yaml"],
    },
    entry_points={"console_scripts": ["mimae = mimae.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "timm>=1.0.20",
        "numpy",
        "Pillow>=11",
        "pydantic>=2",
        "PyYAML",
        "typer",
        "rich",
        "tensorboard",
        "safetensors",
        "matplotlib",
        "scikit-image",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "build",
            "transformers",
        ],
        "peers": ["transformers", "lightly"],
    },
)
