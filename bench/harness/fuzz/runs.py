"""Fuzzing of checkpoints and run directories of a tiny run: they are damaged, then inspected, loaded and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import tempfile
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from mimae.bench.harness.fuzz.case import Case, Content, Special
from mimae.bench.harness.fuzz.draws import ODD_TEXTS, damaged, integer, json_lines, json_text, odd, times, yaml_text
from mimae.bench.harness.fuzz.forked import Wrong
from mimae.bench.harness.fuzz.formats import rezipped
from mimae.bench.harness.fuzz.images import bases
from mimae.bench.harness.fuzz.kind import Kind
from mimae.bench.harness.fuzz.recipes import TINY, likely
from mimae.checkpoints import checkpoint, contents
from mimae.checkpoints.checkpoint import Checkpoint
from mimae.config.kept import load_run
from mimae.config.layers import text
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe, keys, schemas
from mimae.errors import CheckpointError
from mimae.tools.status import look

NEWEST, BEFORE = "run/checkpoints/step-00000002", "run/checkpoints/step-00000001"
_SECTIONS = ("model", "optimizer", "ema")
_LARGEST = 1 << 22
"""Maximal number of pixels of all views of a step, times the depth of the model, that this harness trains."""


def train(recipe: Recipe) -> None:
    """Train a recipe in this process."""
    from mimae.train.tasks.pretrain import pretrain

    pretrain(recipe)


def is_small(recipe: Recipe) -> bool:
    """Return True if a recipe is small enough to train within seconds."""
    height, width = recipe.data.size_hw
    pixels = height * width * recipe.schedule.batch_size * recipe.masking.num_masks
    shape = (recipe.model.width or 192) * (recipe.model.depth or 12) + recipe.decoder.width * recipe.decoder.depth
    wide = max(
        recipe.objective.posterior_width or 0,
        recipe.objective.projector_width if hasattr(recipe.objective, "projector_width") else 0,
    )
    return pixels * max(1, recipe.model.depth or 12) <= _LARGEST and shape <= 1 << 12 and wide <= 1 << 12


@lru_cache(1)
def run_files() -> dict[str, bytes]:
    """Return the files of a finished run with two checkpoints, and its images. A child makes them."""
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if pid == 0:
            try:
                _make(Path(folder))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert status == 0, "the tiny run of the harness failed"
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }


def _make(folder: Path) -> None:
    os.chdir(folder)
    Path("images").mkdir()
    for i in range(9):
        Path(f"images/{i}.png").write_bytes(bases()[6 + i % 2][1])
    Path("recipe.yaml").write_text(TINY)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(load_recipe("recipe.yaml", [], {"run": {"dir": "run"}}).recipe)
    kept = Path("run/config.yaml")
    kept.write_text(kept.read_text().replace(str(folder.resolve()) + "/", ""))


# Checkpoints


def make_checkpoints(draw: random.Random) -> Case:
    files: dict[str, Content] = dict(run_files())
    inside = sorted(name for name in files if name.startswith(NEWEST))
    sealed = draw.random() < 0.7
    for _ in times(draw, 3):
        name = draw.choice(inside)
        content = files[name]
        if draw.random() < 0.06:
            files[name] = draw.choice(
                (
                    Special("fifo"),
                    Special("link", "/dev/zero"),
                    Special("link", "../../../../canary/file"),
                    Special("folder"),
                    Special("sparse", str(10**12)),
                    b"",
                )
            )
        elif isinstance(content, bytes):
            files[name] = _other(draw, name.rpartition("/")[2], content)
    if sealed:
        _seal(files, draw)
    return Case(files, ["sealed" if sealed else "as it was"])


def _other(draw: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith(".json"):
        try:
            return json_text(draw, json.loads(content))
        except (ValueError, RecursionError):  # An earlier change has damaged it.
            return damaged(draw, content)
    if name == ".metadata" and draw.random() < 0.7:
        return _description(draw, content)
    if name.endswith(".distcp") and draw.random() < 0.7:
        return _tensors(draw, content)
    return damaged(draw, content)


def _description(draw: random.Random, content: bytes) -> bytes:
    """Return the description of a checkpoint with a changed size, place or type."""
    try:
        found: Metadata = pickle.loads(content)
        places = dict(found.storage_data)  # This fails if an earlier change has replaced it.
    except Exception:
        return damaged(draw, content)
    name = draw.choice(list(found.state_dict_metadata))
    of = found.state_dict_metadata[name]
    place = draw.choice([place for index, place in places.items() if getattr(index, "fqn", None) == name] or [None])
    number = int.from_bytes(integer(draw, draw.choice((1, 2, 4, 8)), len(content)), "big")
    chance = draw.random()
    if not isinstance(of, TensorStorageMetadata) or place is None or chance < 0.1:
        entries: dict[str, Any] = found.state_dict_metadata
        entries[draw.choice((name, *ODD_TEXTS))] = draw.choice((BytesStorageMetadata(), None, odd(draw)))
    elif chance < 0.3:
        of.size = (
            torch.Size([number % 2**62, *of.size[1:]])
            if draw.random() < 0.5
            else draw.choice((torch.Size([]), odd(draw)))
        )
    elif chance < 0.5:
        chunk = draw.choice(of.chunks)
        for part in ("sizes", "offsets"):
            if draw.random() < 0.5:
                object.__setattr__(chunk, part, torch.Size([number % 2**62, *getattr(chunk, part)[1:]]))
    elif chance < 0.7:
        part = draw.choice(("offset", "length", "relative_path"))
        value = (
            draw.choice((number, -1, odd(draw)))
            if part != "relative_path"
            else draw.choice((*ODD_TEXTS, "state.json", "../x"))
        )
        object.__setattr__(place, part, value)
    elif chance < 0.8:
        of.properties.dtype = draw.choice(
            (torch.float64, torch.int8, torch.complex128, torch.bool, torch.quint8, odd(draw))
        )
    elif chance < 0.9:
        del found.state_dict_metadata[name]
    else:
        found.storage_data = odd(draw)
    try:
        return pickle.dumps(found)
    except Exception:
        return damaged(draw, content)


def _tensors(draw: random.Random, content: bytes) -> bytes:
    """Return a file of tensors with one tensor changed. The tensors are consecutive zip files."""
    starts = [
        at
        for at in range(len(content))
        if content.startswith(b"PK\x03\x04", at) and content[at + 30 :].startswith((b"archive/data.pkl", b"data.pkl"))
    ]
    if not starts:
        return damaged(draw, content)
    at = draw.randrange(len(starts))
    end = starts[at + 1] if at + 1 < len(starts) else len(content)
    one = content[starts[at] : end]
    change: Callable[[bytes], bytes] = partial(damaged, draw)
    return (
        content[: starts[at]]
        + (rezipped(draw, one, change) if draw.random() < 0.7 else damaged(draw, one))
        + content[end:]
    )


def _seal(files: dict[str, Content], draw: random.Random) -> None:
    """Make the manifest match the files, as an attacker would; sometimes it is damaged instead."""
    entries: dict[str, object] = {}
    for name, content in files.items():
        if name.startswith(NEWEST) and isinstance(content, bytes) and not name.endswith("manifest.json"):
            entries[name.rpartition("/")[2]] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files[f"{NEWEST}/manifest.json"] = json.dumps(entries).encode() if draw.random() < 0.9 else json_text(draw, entries)


def use_checkpoints(folder: Path, case: Case) -> str:
    """Load the newest usable checkpoint, and return the reason why a damaged one was not used."""
    said: list[str] = []
    originals = run_files()
    look(folder / "run")

    def take(found: Checkpoint) -> dict[str, torch.Tensor]:
        return {f"{section}.{name}": tensor for section in _SECTIONS for name, tensor in found.tensors(section).items()}

    try:
        used = checkpoint.use(folder / "run", take, said.append)
    except CheckpointError as error:
        raise Wrong(f"an older checkpoint is intact, but none is used: {error}") from error
    assert used is not None
    found, tensors = used
    if found.path.name not in (Path(NEWEST).name, Path(BEFORE).name) or bool(said) != (
        found.path.name == Path(BEFORE).name
    ):
        raise Wrong(f"{found.path.name} is used, and the messages are {said}")
    if case.words == ["as it was"] and found.path.name == Path(NEWEST).name:
        kept = [name for name in originals if name.startswith(NEWEST)]
        if any((folder / name).read_bytes() != originals[name] for name in kept if not name.endswith("manifest.json")):
            raise Wrong("a checkpoint is used whose files differ from those that were saved")
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise Wrong("something other than tensors was loaded")
    return "; ".join(said)


# Run directories

_TEXTS = ("metrics.jsonl", "epochs.jsonl", "events.jsonl", "bad_samples.jsonl")
_LINKS = ("../canary/file", "../../canary/file", "../../canary/folder", "/dev/zero", "/dev/full", "lock", "../images")
_PLACES = tuple(
    f"run/{name}"
    for name in ("checkpoints", "tensorboard", "images", "memory", "replay", "stacks", "nonfinite", ".config.yaml.tmp")
)


def make_runs(draw: random.Random) -> Case:
    files: dict[str, Content] = dict(run_files())
    names = [f"run/{name}" for name in (*_TEXTS, "config.yaml", "environment.json", "latest", "lock")]
    for _ in times(draw):
        name = draw.choice(names)
        content = files.get(name, b"")
        chance = draw.random()
        if chance < 0.15:
            name = draw.choice((name, name, *_PLACES, BEFORE, NEWEST))
            for inner in [each for each in files if each.startswith(f"{name}/")]:
                del files[inner]
            links: list[Content] = [Special("link", target) for target in _LINKS]
            drawn = draw.choice((Special("fifo"), Special("folder"), Special("sparse", str(10**12)), b"", *links))
            # A run follows this link, which its user may have made to another disk. It leads to where it may write.
            is_legal = name == "run/checkpoints" and drawn in links
            files[name] = Special("link", "../images") if is_legal else drawn
        elif chance < 0.22:
            for inner in [each for each in files if each == name or each.startswith(f"{name}/")]:
                del files[inner]
        elif isinstance(content, bytes):
            files[name] = _record(draw, name.removeprefix("run/"), content)
    return Case(files, [draw.choice(("status",) * 5 + ("resume",) * 2 + ("locate",))])


def _record(draw: random.Random, name: str, content: bytes) -> bytes:
    if name in _TEXTS:
        lines = content.splitlines()
        try:
            return json_lines(draw, lines, json.loads(lines[-1]) if lines else {"step": 2, "id": 1})
        except (ValueError, RecursionError):
            return damaged(draw, content)
    if name == "lock":
        owner = {"host": "elsewhere", "boot": "other", "pid": 1, "token": "x", "beats": 0}
        # A valid owner on another host would be watched for ten seconds.
        return json_text(draw, owner | {"boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip()})
    if name == "latest":
        return draw.choice(
            (
                b"",
                b"step-00000001\n",
                b"step-99999999\n",
                b"../../canary\n",
                b"\xff\xfe",
                str(draw.choice(ODD_TEXTS)).encode(errors="replace"),
            )
        )
    if name == "config.yaml" and draw.random() < 0.6:
        import yaml

        try:
            tree = yaml.safe_load(content)
        except yaml.YAMLError:
            return damaged(draw, content)
        section = draw.choice(list(tree)) if isinstance(tree, dict) and tree else None
        inner = tree[section] if section is not None else None
        if isinstance(inner, dict) and inner:
            inner[draw.choice(list(inner))] = odd(draw)
        elif isinstance(tree, dict):
            tree[section] = odd(draw)
        return yaml_text(draw, tree)
    if name == "environment.json":
        return json_text(draw, {"a": 1})
    return damaged(draw, content)


def use_runs(folder: Path, case: Case) -> str:
    """Read the status of the run; then locate its checkpoint or resume it, as the case's words say."""
    run = folder / "run"
    told = look(run)
    if any(not heading or not text for heading, text in told.items()):
        raise Wrong(f"the status is {told!r}")
    contents.names(run)
    if case.words == ["locate"]:
        load_run(run)
        checkpoint.locate(run)
    elif case.words == ["resume"]:
        recipe = load_recipe("recipe.yaml", [], {"run": {"dir": "run"}}).recipe
        train(recipe)
        if not look(run)["state"].startswith("finished after 2"):
            raise Wrong(f"the run was resumed, and its state is {look(run)['state']}")
    return ""


# Legal settings, trained for one or two steps


_NOT_TRAINED = (
    "data.path",
    "data.val_path",
    "run.dir",
    "data.cache_dir",
    "schedule.max_steps",
    "schedule.epochs",
    "data.workers",
)
"""Keys whose values could train for a long time, on other images, or in many processes."""


def make_steps(draw: random.Random) -> Case:
    given = {}
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        key = draw.choice([key for key in keys(Recipe) if key not in _NOT_TRAINED])
        given[key] = likely(draw, key)
    images = {f"images/{i}.png": bases()[6][1] for i in range(9)}
    return Case({"recipe.yaml": TINY.encode(), **images}, [f"{key}={text(value)}" for key, value in given.items()])


def use_steps(folder: Path, case: Case) -> str:
    """Train for two steps."""
    recipe = load_recipe(folder / "recipe.yaml", case.words, {"run": {"dir": "run"}}).recipe
    if not is_small(recipe):
        return "larger than this harness trains"
    train(recipe)
    return ""


CHECKPOINTS = Kind(make_checkpoints, use_checkpoints, run_files, memory=500 << 20)
RUNS = Kind(make_runs, use_runs, run_files, memory=700 << 20)
STEPS = Kind(make_steps, use_steps, schemas)
