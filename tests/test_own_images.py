"""README's command for one's own images, word for word, on each kind of data set that it names."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from mimae import cli
from mimae.config.load import load_recipe
from tests.data.conftest import encoded, photograph
from tests.data.sources.test_shards import write_tar

README = Path(__file__).parents[1] / "README.md"
COUNT = 34  # one batch of the recipe, 32, and some that it leaves out


def images() -> list[bytes]:
    """Return photographs of several shapes as PNG files, no two of which are equal."""
    return [encoded(photograph(i, 40 + i, 50)) for i in range(COUNT)]


def class_folders(folder: Path) -> Path:
    """Write images in one folder per class, so that they have labels."""
    for i, image in enumerate(images()):
        path = folder / f"class {i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image)
    return folder


def flat_folder(folder: Path) -> Path:
    """Write images without labels."""
    for i, image in enumerate(images()):
        (folder / f"{i}.png").write_bytes(image)
    return folder


def list_file(folder: Path) -> Path:
    """Write a list of images, each with a label after a tab."""
    class_folders(folder)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    file = folder / "list.txt"
    file.write_text("".join(f"{name}\t{name.parts[0][-1]}\n" for name in names))
    return file


def tar_shards(folder: Path) -> Path:
    """Write two shards with labels."""
    members = [
        member for i, image in enumerate(images()) for member in ((f"{i}.png", image), (f"{i}.cls", b"%d" % (i % 3)))
    ]
    for number, part in enumerate((slice(0, 20), slice(20, None))):
        write_tar(folder / f"{number}.tar", members[part])
    return folder


def parquet_file(folder: Path) -> Path:
    """Write one file in Hugging Face's format, with labels."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": image, "path": None} for image in images()], kind)
    pq.write_table(pa.table({"image": rows, "label": [i % 3 for i in range(COUNT)]}), folder / "train.parquet")
    return folder / "train.parquet"


def command() -> list[str]:
    """Return the arguments of README's command."""
    section = README.read_text(encoding="utf-8").partition("## Your own images\n")[2]
    program, *arguments = shlex.split(section.partition("```sh\n")[2].partition("```")[0])
    assert program == ".venv/bin/mimae" and {"data.path=/path/to/images", "run.dir=runs/mine"} < set(arguments)
    return arguments


SHORT = ["schedule.max_steps=2"]
QUICK = ["data.loader=torch", "data.workers=0"]  # No loader is measured, and no process is started.
KINDS = [class_folders, flat_folder, list_file, tar_shards, parquet_file]


@pytest.mark.parametrize(
    ("make", "more"),
    [
        *(pytest.param(make, QUICK, id=make.__name__) for make in KINDS),
        pytest.param(class_folders, [], id="class_folders, by the fastest loader", marks=pytest.mark.slow),
    ],
)
def test_the_command_trains_on_it_without_a_validation_set_and_resumes(
    make: Callable[[Path], Path],
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "images").mkdir()
    places = {
        "data.path=/path/to/images": f"data.path={make(tmp_path / 'images')}",
        "run.dir=runs/mine": f"run.dir={tmp_path / 'run'}",
    }
    arguments = [*(places.get(word, word) for word in command()), *SHORT, *more]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RANK", raising=False)

    def mimae(*overrides: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mimae", *arguments, *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capfd.readouterr()
        assert not ended.value.code, output
        return output.out

    first = mimae("run.dry=true").splitlines()
    assert first[0].startswith("no validation set: photos-test ") and "data.val_path=PATH" in first[0]
    statistics = "data.mean=[0.485, 0.456, 0.406], data.std=[0.229, 0.224, 0.225]"
    assert sum(f"data.crop_scale=[0.2, 1.0], {statistics}" in line for line in first) == 1
    settings = (tmp_path / "run/config.yaml").read_text()
    assert load_recipe(tmp_path / "run/config.yaml").recipe.data.val_path is None

    again = mimae()
    assert "at step 1 of 2" in again and "no validation set" not in again
    assert (tmp_path / "run/config.yaml").read_text().replace("dry: false", "dry: true") == settings
    (epoch,) = (json.loads(line) for line in (tmp_path / "run/epochs.jsonl").read_text().splitlines()[-1:])
    assert (epoch["step"], epoch["knn"], epoch["val_rec"]) == (2, None, None)


def test_commands_of_recipes_for_a_known_data_set_name_its_validation_set() -> None:
    commands = [line for line in README.read_text(encoding="utf-8").splitlines() if "mimae pretrain vit_" in line]
    assert len(commands) >= 3 and all(" data.path=" in line and " data.val_path=" in line for line in commands)
