"""Tests of what a user installs: the sdist and the wheel, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGED = {"mimae": "mimae", "kernels": "mimae/kernels", "bench": "mimae/bench", "configs": "mimae/configs"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Return the standard output of a command, which runs without access to the checkout and to a package index."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    environment |= {"PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(source: Path, kind: str, into: Path) -> Path:
    """Build an sdist or a wheel of the tree `source` with the installed setuptools."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", into, cwd=source)
    (made,) = into.iterdir()
    return made


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def sdist(work: Path) -> Path:
    """Build the sdist from a copy, because a build writes files next to setup.py."""
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    copy = shutil.copytree(CHECKOUT, work / "checkout", symlinks=True, ignore=unwanted)
    return build(copy, "sdist", work / "sdist")


@pytest.fixture(scope="module")
def wheel(work: Path, sdist: Path) -> Path:
    """Build the wheel of the checkout."""
    return build(work / "checkout", "wheel", work / "wheel")


@pytest.fixture(scope="module")
def python(work: Path, wheel: Path) -> Path:
    """Return the interpreter of an environment that has the wheel and the requirements, but not the checkout.

    The requirements (gigabytes) are those of the environment that runs the tests, added by a .pth file. Python does not
    read .pth files in a folder that a .pth file names, so the editable install of the checkout is not visible.
    """
    home = work / "environment"
    venv.create(home, with_pip=False)
    interpreter = home / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    site.joinpath("requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", wheel, cwd=work)
    return interpreter


def test_wheel_holds_every_module_and_recipe(wheel: Path) -> None:
    expected = set()
    for folder, place in PACKAGED.items():
        for path in sorted((CHECKOUT / folder).rglob("*")):
            inside = path.relative_to(CHECKOUT / folder)
            linked = folder == "mimae" and f"mimae/{inside.parts[0]}" in PACKAGED.values()
            if path.suffix in (".py", ".yaml", ".css", ".js") and not linked:
                expected.add(f"{place}/{inside.as_posix()}")
    assert "mimae/configs/quickstart.yaml" in expected
    extension = {"mimae/_C.abi3.so"} if shutil.which("c++") else set()
    assert names(wheel) == expected | extension | {"mimae/py.typed", "mimae/kernels/py.typed"}


def test_wheel_of_the_sdist_is_the_same(work: Path, sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (tree,) = (work / "unpacked").iterdir()
    assert {"LICENSE", "README.md", "CITATION.cff", "constraints.txt"} <= {p.name for p in tree.iterdir()}
    assert names(build(tree, "wheel", work / "wheel-of-sdist")) == names(wheel)


def test_installed_wheel_runs_without_the_checkout(python: Path, tmp_path: Path) -> None:
    code = "import mimae.kernels, mimae.configs as c; print(mimae.__file__, mimae.kernels.__file__, c.__file__)"
    for file in run(python, "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(python.parents[1]), f"{file} is not the installed one"
    code = "import torch; from mimae import kernels; print(kernels.reason('orthogonal_masks', torch.device('cpu')))"
    assert not shutil.which("c++") or run(python, "-c", code, cwd=tmp_path) == "native\n"
    mimae = python.with_name("mimae")
    assert "pretrain" in run(mimae, "--help", cwd=tmp_path)
    assert "num_masks" in run(mimae, "config", "quickstart", cwd=tmp_path)


def test_installed_wheel_trains_a_step(python: Path, tmp_path: Path) -> None:
    run(python.with_name("mimae"), "pretrain", "quickstart", "run.dir=run", "run.dry=true", cwd=tmp_path)
    assert (tmp_path / "run" / "latest").is_file()
