"""Tests of text in settings: overrides, paths with `~` and variables, and files that would exhaust a reader."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimae.config.load import load_recipe
from mimae.config.printing import as_yaml
from mimae.config.recipe import Recipe
from mimae.config.texts import escaped, expanded, text_keys
from mimae.data.settings import DataSettings
from mimae.errors import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/users/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch/job 7")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


def problem(recipe: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        load_recipe(recipe, overrides)  # type: ignore[call-overload]
    return str(refusal.value)


def test_the_keys_of_text_and_of_paths() -> None:
    keys = text_keys(Recipe)
    assert {
        "run.dir",
        "data.path",
        "data.val_path",
        "data.subset",
        "data.cache_dir",
        "engine.offload_path",
    } == keys.paths
    assert {"data.image_key", "data.label_key"} <= keys.texts and keys.paths < keys.texts
    assert not {"data.loader", "seed", "data.mean", "masking.kind"} & keys.texts


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/data/set #1/train", "/data/set #1/train"),
        ("'/data/set #1/train'", "/data/set #1/train"),
        ('"/data/a"', "/data/a"),
        ("\"a'", "\"a'"),  # No pair.
        ("[a", "[a"),
        ("{000..127}.tar", "{000..127}.tar"),
        ("a: b", "a: b"),
        ("12", "12"),
        ("*.tar", "*.tar"),
        ("!x &y", "!x &y"),
        ("'null'", "null"),
        ("  /data/a ", "/data/a"),
        ("~/images", "/users/somebody/images"),
        ("~", "/users/somebody"),
        ("a~b", "a~b"),
        ("$SCRATCH/images", "/scratch/job 7/images"),
        ("${SCRATCH}x", "/scratch/job 7x"),
        ("torchvision:CIFAR10:$SCRATCH", "torchvision:CIFAR10:/scratch/job 7"),
        ("cost in $$", "cost in $"),
    ],
)
def test_an_override_of_text_stands_as_it_is(given: str, kept: str) -> None:
    recipe = load_recipe({}, [f"data.path={given}", f"run.dir={given}", f"data.val_path={given}"]).recipe
    assert recipe.data.path == recipe.run.dir == recipe.data.val_path == kept


@pytest.mark.parametrize("given", ["null", "", "  ", "NULL"])
def test_null_and_nothing_mean_none(given: str) -> None:
    assert load_recipe({"data": {"val_path": "x"}}, [f"data.val_path={given}"]).recipe.data.val_path is None
    assert "run.dir = null (override): legal is text" in problem({}, f"run.dir={given}")


def test_other_keys_are_yaml_as_before() -> None:
    recipe = load_recipe(
        {}, ["seed=7 # a comment", "data.mean=[0.5, 0.5, 0.5]", "data={path: a}", "data.loader=torch"]
    ).recipe
    assert (recipe.seed, recipe.data.mean[0], recipe.data.path, recipe.data.loader) == (7, 0.5, "a", "torch")


def test_paths_of_recipes_and_of_python_are_expanded(here: Path) -> None:
    (here / "x.yaml").write_text("data: {path: $SCRATCH/a, val_path: ~/b}\nrun: {dir: '${SCRATCH}/run'}\n")
    found = load_recipe("x.yaml").recipe
    assert (found.data.path, found.data.val_path, found.run.dir) == (
        *("/scratch/job 7/a", "/users/somebody/b"),
        "/scratch/job 7/run",
    )
    assert (
        load_recipe({"data": {"path": "~/a"}}, settings={"run": {"dir": "~/r"}}).recipe.data.path == "/users/somebody/a"
    )
    (here / "deeper").mkdir()
    os.environ["SCRATCH"] = str(here)
    (here / "deeper/y.yaml").write_text("base: $SCRATCH/x.yaml\n")
    assert load_recipe("deeper/y.yaml").recipe.data.path == f"{here}/a"


def test_what_cannot_be_expanded_is_told(here: Path) -> None:
    text = problem({}, "data.path=$NOWHERE/a", "run.dir=~nobody-of-that-name/x")
    assert "data.path = $NOWHERE/a (override): the environment variable NOWHERE is not set" in text
    assert "there is no user nobody-of-that-name" in text
    (here / "a$NOWHERE").mkdir()
    assert load_recipe({}, ["data.path=a$NOWHERE"]).recipe.data.path == "a$NOWHERE"


@given(st.text(st.sampled_from("$SCRATH{}a/ #'\"\\"), min_size=1, max_size=12))
def test_a_path_survives_being_written_and_read(path: str) -> None:
    assert expanded(escaped(path)) == path
    recipe = Recipe(data=DataSettings(path=path))
    Path("again.yaml").write_text(as_yaml(recipe))
    assert load_recipe("again.yaml").recipe.data.path == path
    assert load_recipe(recipe).recipe.data.path == path


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 10)}]\n" for before, after in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, "has 1,234,567,909 keys and values"),
        ("seed: &a [*a]\n", "nested too deeply, or contains itself"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("seed: 1\n#" + "x" * (1 << 16), "more than 65,536 bytes"),
        ("data:\n" + "".join(f"  unknown_{i}: 1\n" for i in range(2000)), "and 1,980 more unknown keys"),
        ("".join(f"a{i}: 1\n" for i in range(6000)), "at most 10,000 are allowed"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
        ("base: " + "x" * 5000, "is not a valid file name"),
        ("base: /dev/zero\n", "neither a file nor a shipped recipe"),
        ("base: $NOWHERE/x\n", "the environment variable NOWHERE is not set"),
        ("seed: 1\n".encode("utf-16").decode("latin-1"), "written in UTF-16"),
    ],
)
def test_recipes_that_would_exhaust_a_reader(here: Path, content: str, said: str) -> None:
    (here / "x.yaml").write_bytes(content.encode("latin-1"))
    began = time.process_time()
    assert said in problem("x.yaml")
    assert time.process_time() - began < 30, "it was read, or every key of it was looked up"


def test_an_override_is_bounded_too() -> None:
    assert "nested too deeply" in problem({}, "data.mean=" + "[" * 5000)


def test_a_base_that_never_answers(here: Path) -> None:
    """Reading a pipe would wait for a writer, and some system files do not state their size."""
    os.mkfifo(here / "pipe")
    (here / "x.yaml").write_text("base: pipe\n")
    assert "neither a file nor a shipped recipe" in problem("x.yaml")
    (here / "x.yaml").write_text("base: /proc/version\n")
    assert "/proc/version: text or a list" in problem("x.yaml")
