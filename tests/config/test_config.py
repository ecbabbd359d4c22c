"""Tests of recipes: the sources of values, and the messages about mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mimae.config.layers import shipped
from mimae.config.load import load_recipe
from mimae.config.printing import as_yaml, explain, reference
from mimae.config.recipe import FREE_KEYS, Recipe, RunRecipe, flat, keys, resume_of
from mimae.errors import ConfigError
from mimae.optim.schedule import total_steps

SMALL = """\
data:
  image_size: 32
model:
  patch_size: 4
  width: 96
  heads: 4
schedule:
  epochs: 6
  warmup_epochs: 1
  batch_size: 32
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a user's recipe into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("small.yaml").write_text(SMALL)
    return "small.yaml"


def problems(recipe: Any, *overrides: str, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, overrides, settings)
    assert all(problem in str(error.value) for problem in error.value.problems)
    return error.value.problems


def problem(recipe: Any, *overrides: str, **settings: Any) -> str:
    found = problems(recipe, *overrides, **settings)
    assert len(found) == 1, found
    return found[0]


# The shipped recipes


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipe_opens_with_its_command_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    resolved = load_recipe(name, (), None, RunRecipe)
    first, second, *_ = shipped()[name].read_text().splitlines()
    task = resolved.recipe.task
    verbs = {"classify": ["finetune", "linear"]}.get(task, [task])
    assert first.startswith("# ") and any(f"mimae {verb} {name}" in first for verb in verbs)
    assert second.startswith("# Hardware: ") and "xpected time: " in second
    for printed in (as_yaml(resolved.recipe), explain(resolved)):
        (tmp_path / "copy.yaml").write_text(printed)
        assert load_recipe(tmp_path / "copy.yaml", (), None, RunRecipe).recipe == resolved.recipe


@pytest.mark.parametrize(("base", "samples"), [("quickstart", 6400), ("cifar10", 9000)])
def test_controls_differ_from_their_base_in_what_they_control_only(base: str, samples: int) -> None:
    def recipe(control: str) -> Recipe:
        return load_recipe(f"{base}{control}", ["run.dir=x"]).recipe

    def changed(control: str) -> dict[str, Any]:
        ours = flat(recipe(""))
        return {key: value for key, value in flat(recipe(control)).items() if value != ours[key]}

    def steps(r: Recipe) -> int:
        return total_steps(r.schedule, samples // r.schedule.batch_size)

    def warmup_steps(r: Recipe) -> float:
        return r.schedule.warmup_epochs * (samples // r.schedule.batch_size)

    no_mi = {"objective.max_mi": 0, "objective.min_mi": 0}
    assert changed("_max_mi") == {"objective.min_mi": 0}
    assert changed("_orthogonal") == no_mi
    assert changed("_independent") == no_mi | {"masking.kind": "independent"}
    assert changed("_next_view") == {"decoder.predict": "next_view"}
    assert changed("_cross") == {"decoder.attention": "cross"}
    mae, ours = recipe("_mae"), recipe("")
    length = {"schedule.batch_size", "schedule.epochs", "schedule.warmup_epochs"}
    own = {
        "masking.rounding": "down",
        "model.patch_bias": "uniform",
        "optimizer.decay_tokens": True,
        "schedule.warmup_from_zero": True,
    }
    assert changed("_mae").keys() == no_mi.keys() | {"masking.num_masks"} | length | own.keys()
    assert own.items() <= changed("_mae").items(), "what MAE's code does otherwise"
    assert mae.masking.num_masks == 1 and mae.schedule.batch_size == 4 * ours.schedule.batch_size
    assert steps(mae) == steps(ours) and warmup_steps(mae) == warmup_steps(ours)


# Reading


def test_origins(small: str) -> None:
    Path("variant.yaml").write_text("# three lines\nbase: small.yaml\nmasking: {ratio: 0.8}\nmodel.depth: 3\n")
    resolved = load_recipe("variant.yaml", ["schedule.epochs=7"], {"seed": 5})
    recipe, origins = resolved.recipe, resolved.origins
    assert tuple(origins) == keys(Recipe) == tuple(flat(recipe))
    expected = {
        "data.image_size": (32, "small.yaml:2"),
        "masking.ratio": (0.8, "variant.yaml:3"),
        "model.depth": (3, "variant.yaml:4"),
        "model.size": ("base", "default"),
        "schedule.epochs": (7, "override"),
        "seed": (5, "argument"),
        "run.dir": ("runs/variant", "from the recipe's name"),
    }
    assert {key: (flat(recipe)[key], origins[key]) for key in expected} == expected
    assert load_recipe(small, ["model.heads=null"]).origins["model.heads"] == "from model.size"
    printed = explain(resolved).splitlines()
    assert "  depth: 3                       # variant.yaml:4" in printed
    assert len({line.index(" # ") for line in printed if " # " in line}) == 1


def test_origin_outside_the_working_directory_is_absolute(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe("../small.yaml").origins["data.image_size"] == f"{tmp_path.resolve()}/small.yaml:2"


def test_base_is_a_shipped_name_or_a_path_relative_to_the_file(small: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.yaml").write_text("base: ../small.yaml\n")
    (tmp_path / "deep/b.yaml").write_text("base: a.yaml\nseed: 1\n")
    assert load_recipe("deep/b.yaml").recipe.data.image_size == 32
    (tmp_path / "c.yaml").write_text("base: quickstart\n")
    assert load_recipe("c.yaml").recipe.decoder == load_recipe("quickstart").recipe.decoder
    # A file of the same name does not hide the shipped recipe.
    (tmp_path / "quickstart.yaml").write_text("base: quickstart\nseed: 9\n")
    assert load_recipe("quickstart").recipe.seed == 0 and load_recipe("quickstart.yaml").recipe.seed == 9


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.learning_rate=2", 2.0),
        ("compile=off", "off"),
        ("data.val_path=null", None),
        ("data.val_path=", None),
        ("data.val_path='1e-3'", "1e-3"),
        ("data.image_size=[32, 64]", [32, 64]),
        ("schedule.max_steps=010", 10),
        ("run.dir=runs/2020-01-01", "runs/2020-01-01"),
        ("data.max_pixels=1_000_000", 1_000_000),
    ],
)
def test_override_values(small: str, override: str, value: Any) -> None:
    key = override.partition("=")[0]
    recipe = load_recipe(small, [override]).recipe
    found = flat(recipe)[key]
    assert found == value and type(found) is type(value)
    Path("copy.yaml").write_text(as_yaml(recipe))
    assert load_recipe("copy.yaml").recipe == recipe


def test_the_last_override_wins_and_a_mapping_sets_several_keys(small: str) -> None:
    recipe = load_recipe(small, ["masking={num_masks: 2, ratio: 0.6}", "seed=1", "seed=2"]).recipe
    assert (recipe.masking.num_masks, recipe.masking.ratio, recipe.seed) == (2, 0.6, 2)


def test_a_recipe_from_python(small: str) -> None:
    by_file = load_recipe(small, ["masking.num_masks=2"]).recipe
    by_mapping = load_recipe(
        {"base": "small.yaml", "run": {"dir": "runs/small"}, "masking": {"num_masks": 2}, "data": {}}
    ).recipe
    assert by_mapping == by_file
    # A recipe object can be loaded again, with overrides as for a file.
    assert load_recipe(by_file, ["seed=3"]).recipe == by_file.model_copy(update={"seed": 3})
    assert load_recipe(small, settings={"data": {"image_size": (32, 64)}}).recipe.data.size_hw == (32, 64)


SIZED = ("model.patch_size", "model.width", "model.depth", "model.heads")


def test_a_size_named_later_takes_the_place_of_the_numbers_given_before(small: str) -> None:
    def shape(recipe: Any, *overrides: str, **settings: Any) -> list[int]:
        values = flat(load_recipe(recipe, overrides, settings).recipe)
        return [values[key] for key in SIZED]

    assert shape(small, "model.size=large") == [16, 1024, 24, 16]
    assert {load_recipe(small, ["model.size=large"]).origins[key] for key in SIZED} == {"from model.size"}
    assert shape(small, "model.depth=3") == [4, 96, 3, 4]  # No size is named, so the recipe's numbers stay.
    Path("large.yaml").write_text("base: small.yaml\nmodel: {size: large, patch_size: 8}\n")
    assert shape("large.yaml") == [8, 1024, 24, 16]
    Path("flat.yaml").write_text("base: large.yaml\nmodel: {depth: 2}\n")
    assert shape("flat.yaml") == [8, 1024, 2, 16]
    assert shape({"base": "flat.yaml", "model": {"size": "tiny"}}) == [16, 192, 12, 3]
    assert shape(load_recipe("flat.yaml").recipe, "model.size=tiny") == [16, 192, 12, 3]
    # The overrides of one call belong together, in any order.
    assert shape("flat.yaml", "model.width=48", "model.size=tiny", "model.patch_size=8") == [8, 48, 12, 3]
    assert shape("flat.yaml", "model.width=48", model={"size": "tiny"}) == [16, 48, 12, 3]


def validation(recipe: Any, *overrides: str, **settings: Any) -> tuple[str | None, str, int]:
    """Return the resolved data.val_path of a recipe, its origin, and the number of notes at the start of its run."""
    resolved = load_recipe(recipe, overrides, settings)
    return resolved.recipe.data.val_path, resolved.origins["data.val_path"], len(resolved.notes)


@pytest.fixture
def with_images(small: str) -> str:
    """Write a recipe that names training images and their validation set."""
    Path("images.yaml").write_text("base: small.yaml\ndata: {path: train, val_path: held}\n")
    return "images.yaml"


def test_who_replaces_the_images_alone_has_no_validation_set(with_images: str) -> None:
    """This holds for an override, an argument, a recipe with a base, and a Recipe object, and is always reported."""
    kept = ("held", "images.yaml:2", 0)
    assert validation(with_images) == validation(with_images, "seed=1", "data.path=train") == kept
    why = "no validation set: held (images.yaml:2) belongs to data.path=train, which is replaced"
    assert validation(with_images, "data.path=mine") == (None, f"{why} (override)", 1)
    assert validation(with_images, "data={path: mine}") == (None, f"{why} (override)", 1)
    assert validation(with_images, data={"path": "mine"}) == (None, f"{why} (argument)", 1)
    Path("mine.yaml").write_text("base: images.yaml\ndata:\n  path: mine\n")
    assert validation("mine.yaml") == validation({"base": "mine.yaml"}) == (None, f"{why} (mine.yaml:3)", 1)
    assert validation(load_recipe(with_images).recipe, "data.path=mine")[::2] == (None, 1)
    # A val_path without data.path belongs to the default images.
    assert validation({"data": {"val_path": "photos-test"}}, "data.path=mine")[::2] == (None, 1)
    resolved = load_recipe(with_images, ["data.path=mine"])
    (note,) = resolved.notes
    assert note.startswith(why) and "data.val_path=PATH" in note and "\n" not in note
    printed = [line.split(maxsplit=3) for line in explain(resolved).splitlines()]
    assert ["val_path:", "null", "#", f"{why} (override)"] in printed


def test_who_names_both_or_the_validation_set_alone_has_what_was_named(with_images: str) -> None:
    assert validation(with_images, "data.path=mine", "data.val_path=other") == ("other", "override", 0)
    assert validation(with_images, "data.val_path=other", data={"path": "mine"}) == ("other", "override", 0)
    assert validation(with_images, "data.path=mine", "data.val_path=null") == (None, "override", 0)
    assert validation(with_images, "data.val_path=other") == ("other", "override", 0)
    Path("mine.yaml").write_text("base: images.yaml\ndata: {path: mine}\n")
    Path("held.yaml").write_text("base: mine.yaml\ndata: {val_path: other}\n")
    assert validation("held.yaml") == ("other", "held.yaml:2", 0)
    assert validation("held.yaml", "data.path=mine") == ("other", "held.yaml:2", 0)
    assert validation("small.yaml", "data.path=mine") == (None, "default", 0)


def test_a_resumed_run_keeps_the_validation_set_that_it_was_started_with(with_images: str) -> None:
    """This holds if the command names no validation set and no other images."""
    again = ("data.path=mine", "run.dir=run")
    Path("run").mkdir()
    for started in ("held", None):
        begun = load_recipe(with_images, [*again, f"data.val_path={started or 'null'}"])
        Path("run/config.yaml").write_text(as_yaml(begun.recipe))
        line = Path("run/config.yaml").read_text().splitlines().index(f"  val_path: {started or 'null'}") + 1
        assert validation(with_images, *again) == (started, f"run/config.yaml:{line}", 0)
    assert validation(with_images, *again, "data.val_path=other") == ("other", "override", 0)
    assert validation(with_images, "data.path=others", "run.dir=run")[::2] == (None, 1)
    # The run itself refuses a config.yaml that is not a recipe, before anything is overwritten.
    for content in ("", "- a", "data: {path: mine}\n"):
        Path("run/config.yaml").write_text(content)
        assert validation(with_images, *again)[::2] == (None, 1)


def test_the_best_checkpoint_needs_a_validation_set_that_stays(with_images: str) -> None:
    best = ["checkpoint.best=knn", "telemetry.probe_every_epochs=1"]
    load_recipe(with_images, best)
    assert "data.val_path = null (no validation set: held " in problem(with_images, *best, "data.path=mine")


def test_text_that_a_run_could_not_keep() -> None:
    """A config.yaml of more than LARGEST_FILE bytes could be written but not read."""
    with pytest.raises(ConfigError, match=r"run.dir = .* \(override\): 70,000 characters; legal are at most 4,096"):
        load_recipe("quickstart", [f"run.dir={'x' * 70_000}"])
    with pytest.raises(ConfigError, match=r"data.mean = .*: not UTF-8"):
        load_recipe({"data": {"mean": [{"a": "\ud800"}]}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"data:\n  path: [a\nseed: 1\n", "bad.yaml:3: not YAML: expected ',' or ']'"),
        (b"data:\n\tpath: a\n", "bad.yaml:2: not YAML: found character '\\t'"),
        (b"\x89PNG\r\n\x1a\n\x00", "bad.yaml: cannot be read: byte 0 is not UTF-8"),
        (b"import torch\n", "bad.yaml: text or a list, not a recipe"),
        (b"- seed\n", "bad.yaml: text or a list, not a recipe"),
        (b"# nothing\n", "bad.yaml: empty, not a recipe"),
        (
            b"seed: 1\ndata:\n  path: a\n  path: b\n",
            "bad.yaml:4: data.path is given twice, first at bad.yaml:3",
        ),
        (b"seed: 1\nseed: 2\n", "bad.yaml:2: seed is given twice"),
        (b"base: nosuch\n", "bad.yaml:1: base recipe 'nosuch' is neither a file nor a shipped recipe"),
        (b"base: [a]\n", "bad.yaml:1: base must be the name or the path of one recipe, not [a]"),
        (b"seed: !!int one\n", "seed (bad.yaml:1): invalid literal"),
        (
            b"data:\n  path: !env HOME\n",
            "data.path (bad.yaml:2): !env is not a supported kind of value; a value is null",
        ),
        (b"? [a, b]\n: 1\n", "bad.yaml:1: a key is a name, not a list or a mapping"),
        (b"base: bad.yaml\n", "the bases of recipes form a circle: bad.yaml -> bad.yaml"),
    ],
)
def test_files_that_are_no_recipe(small: str, content: bytes, said: str) -> None:
    Path("bad.yaml").write_bytes(content)
    # The default warm-up is longer than one epoch. This is not reported, because the recipe could not be read.
    assert problem("bad.yaml", "schedule.epochs=1").startswith(said)


def test_a_circle_of_bases_is_named_in_full(small: str) -> None:
    for here, there in ("ab", "bc", "cb"):
        Path(f"{here}.yaml").write_text(f"base: {there}.yaml\n")
    assert problem("a.yaml").endswith("b.yaml -> c.yaml -> b.yaml")


def test_recipes_that_are_not_there(small: str) -> None:
    assert "did you mean quickstart?" in problem("quikstart")
    assert problem("nosuch.yaml").startswith("recipe 'nosuch.yaml' is neither a file nor a shipped recipe; ")
    assert problem(".").startswith("recipe '.' is a folder")


def test_overrides_that_are_none(small: str) -> None:
    assert problems(small, "seed", "=3", "data.mean=[a") == [
        "'seed': an override is written section.key=value",
        "'=3': an override is written section.key=value",
        "'data.mean=[a': not YAML: expected ',' or ']', but got '<stream end>'; "
        "quote text with YAML's signs: key='\"text\"'",
    ]


# Keys and values


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lerning_rate=1", "did you mean optimizer.learning_rate?"),
        ("optimiser.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("optimizer.num_masks=1", "did you mean masking.num_masks?"),
        ("learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("masks=1", "did you mean masking.num_masks?"),
        ("decoder.widht=1", "did you mean decoder.width?"),
        ("sead=1", "did you mean seed?"),
        ("masking.zzz=1", "masking has kind, num_masks, ratio"),
        ("task=segmant", "legal here is pretrain"),
        ("zzz=1", "a recipe has task, seed, precision, compile, run, "),
        ("masking=4", "masking is a section; its keys are kind, num_masks, ratio"),
        ("seed.low=4", "seed has no keys of its own; legal is an integer"),
    ],
)
def test_unknown_keys(small: str, override: str, said: str) -> None:
    text = problem(small, override)
    assert said in text and "(override)" in text and text.startswith(override.partition("=")[0])


def test_a_section_without_keys_is_no_mistake(small: str) -> None:
    Path("empty.yaml").write_text("base: small.yaml\nmasking:\n  # num_masks: 5\n")
    assert load_recipe("empty.yaml").recipe.masking == load_recipe(small).recipe.masking


@pytest.mark.parametrize(
    ("override", "legal"),
    [
        ("seed=-1", "an integer at least 0 and below 4294967296"),
        ("seed=4294967296", "an integer at least 0 and below 4294967296"),
        ("seed=true", "an integer at least 0 and below 4294967296"),
        ("seed='4'", "an integer at least 0 and below 4294967296"),
        ("masking.num_masks=0", "an integer from 1 to 64"),
        ("masking.num_masks=2.0", "an integer from 1 to 64"),
        ("masking.ratio=1.0", "a number above 0 and below 1"),
        ("decoder.attention=full", "self or cross"),
        ("compile=false", "auto, on, graphs or off"),
        ("run.dry=1", "true or false"),
        ("ema.decay=.inf", "a number above 0 and below 1, or null"),
        (
            "data.image_size=33.5",
            "an integer from 1 to 16384, or a list of 2 values, each an integer from 1 to 16384",
        ),
        ("data.mean=[0.5]", "a list of 3 values, each a number"),
        ("run.dir=null", "text that is not empty"),
    ],
)
def test_illegal_values(small: str, override: str, legal: str) -> None:
    key, _, value = override.partition("=")
    assert problem(small, override) == f"{key} = {value} (override): legal is {legal}"


def test_what_a_section_checks_itself_is_told_with_its_origin(small: str) -> None:
    assert problem(small, "data.crop_scale=[1, 0.5]").startswith("data.crop_scale = [1, 0.5] (override): ")


def test_values_from_python_are_no_less_checked(small: str) -> None:
    said = problems(small, seed=1.5, data={"image_size": (0, 32)}, masking={"ratio": object})
    assert [text.partition(" (argument): legal is ")[0] for text in said[:2]] == [
        "seed = 1.5",
        "data.image_size = [0, 32]",
    ]
    assert said[2].startswith("masking.ratio = ")


# Keys that depend on each other. Each illegal case comes with the nearest legal case, which has to load.


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        (  # 64 patches, 16 visible in each mask
            ["masking.num_masks=5"],
            ["masking.num_masks=4"],
            [
                "masking.num_masks = 5 (override)",
                "at most 4 masks",
                "masking.ratio = 0.75 (default)",
                "image of 64",
            ],
        ),
        (
            ["masking.num_masks=5"],
            ["masking.num_masks=5", "masking.kind=independent"],
            ["masking.kind=independent"],
        ),
        (["masking.num_masks=5"], ["masking.num_masks=5", "masking.ratio=0.82"], ["a higher masking.ratio"]),
        (  # 16 x 24 = 6 patches of 8, of which 2 are visible
            ["data.image_size=[16, 24]", "model.patch_size=8", "masking.ratio=0.67"],
            ["data.image_size=[16, 24]", "model.patch_size=8", "masking.ratio=0.67", "masking.num_masks=3"],
            ["at most 3 masks that show 2"],
        ),
        (
            ["data.image_size=[32, 50]"],
            ["data.image_size=[32, 48]"],
            [
                "data.image_size = [32, 50] (override)",
                "model.patch_size = 4 (small.yaml:4)",
                "nearest is 32 x 48",
            ],
        ),
        (
            ["model.patch_size=32"],
            ["model.patch_size=16", "masking.num_masks=2"],
            ["data.image_size = 32 (small.yaml:2)", "at least 2, one visible and one hidden"],
        ),
        (
            ["model.heads=5"],
            ["model.heads=6"],
            ["model.heads = 5 (override)", "model.width = 96 (small.yaml:5)", "12"],
        ),
        (
            ["decoder.heads=5"],
            ["decoder.heads=8"],
            ["decoder.width = 512 (default)", "legal are 1, 2, 4, 8, 16"],
        ),
        (
            ["model.width=98", "model.heads=2"],
            ["model.width=100"],
            ["model.width = 98 (override)", "a multiple of 4"],
        ),
        (
            ["decoder.width=66", "decoder.heads=6"],
            ["decoder.width=72", "decoder.heads=6"],
            ["decoder.width = 66 (override)", "a multiple of 4"],
        ),
        (
            ["schedule.accumulate=3"],
            ["schedule.accumulate=4"],
            ["schedule.batch_size = 32 (small.yaml:10)", "by 3", "ranks (1)", "; the nearest is 30 or 33"],
        ),
        (
            ["schedule.warmup_epochs=6.5"],
            ["schedule.warmup_epochs=6"],
            ["schedule.warmup_epochs = 6.5 (override)", "at most schedule.epochs = 6 (small.yaml:8)"],
        ),
        (
            ["checkpoint.best=knn", "telemetry.probe_every_epochs=1"],
            ["checkpoint.best=knn", "telemetry.probe_every_epochs=1", "data.val_path=x"],
            ["checkpoint.best = knn (override)", "legal is null, or set both"],
        ),
        (
            ["masking.num_masks=1"],
            ["masking.num_masks=1", "objective.max_mi=0"],
            ["objective.max_mi = 0.03 (default)", "masking.num_masks = 1 (override)"],
        ),
        (
            ["decoder.predict=next_view", "masking.kind=independent"],
            ["decoder.predict=next_view", "decoder.attention=cross"],
            [
                "decoder.predict = next_view (override)",
                "masking.kind = independent (override)",
                "decoder.predict=hidden",
            ],
        ),
        (  # the next view of one view is itself
            ["decoder.predict=next_view", "masking.num_masks=1", "objective.max_mi=0"],
            ["decoder.predict=next_view", "masking.num_masks=2", "objective.max_mi=0"],
            ["legal are at least 2 orthogonal", "masking.num_masks = 1 (override)"],
        ),
        (
            ["schedule.accumulate=32", "objective.min_mi=0"],
            ["schedule.accumulate=16"],
            ["objective.max_mi = 0.03 (default)", "schedule.accumulate = 32 (override)"],
        ),
        (
            ["schedule.batch_size=1", "objective.max_mi=0"],
            ["schedule.batch_size=1", "objective.max_mi=0", "objective.min_mi=0"],
            ["objective.min_mi = 0.01 (default)", "schedule.batch_size = 1 (override)"],
        ),
    ],
)
def test_keys_that_must_agree(small: str, wrong: list[str], right: list[str], said: list[str]) -> None:
    load_recipe(small, right)
    text = problem(small, *wrong)
    assert all(part in text for part in said), text


def test_the_batch_is_split_over_the_ranks(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (
        "must be divisible by 6 = ranks (3) x schedule.accumulate = 2 (override); the nearest is 30 or 36"
        in problem(small, "schedule.accumulate=2")
    )
    load_recipe(small, ["schedule.accumulate=2", "schedule.batch_size=36"])


def test_all_problems_at_once(small: str) -> None:
    """Keys are compared although other keys are unknown or illegal, but not the keys of an illegal section."""
    Path("bad.yaml").write_text("base: small.yaml\nmasking:\n  num_masks: 5\n")
    said = problems("bad.yaml", "optimizer.lerning_rate=1", "compile=maybe", "schedule.epochs=0", "model.heads=5")
    assert sorted(text.split(" ")[0] for text in said) == [
        "compile",
        "masking.num_masks",
        "model.heads",
        "optimizer.lerning_rate",
        "schedule.epochs",
    ]


@pytest.mark.parametrize(
    ("key", "resume"),
    [
        ("seed", "fixed"),
        ("compile", "rounding"),
        ("model.width", "fixed"),
        ("model.attention", "rounding"),
        ("data.path", "free"),
        ("data.workers", "free"),
        ("data.cache", "rounding"),
        # The message of a section names its keys.
        ("engine.kind", "rounding"),
        ("run.dir", "free"),
        ("checkpoint.keep", "free"),
        ("telemetry.trackers", "free"),
    ],
)
def test_a_key_says_whether_a_resumed_run_may_change_it(key: str, resume: str) -> None:
    assert resume_of(key) == resume
    assert (key in FREE_KEYS) == (resume != "fixed")
    (row,) = (line for line in reference().splitlines() if line.startswith(f"| `{key}` |"))
    assert f"| {resume} |" in row


def test_settings_reference_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == reference(), "run: mimae settings > docs/settings.md"


def test_every_key_has_a_meaning_and_a_legal_range_in_words() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(keys())
    assert all(cell.strip() for row in rows for cell in row.replace("\\|", "/").strip("|").split("|"))
    assert "None" not in "".join(rows)


@pytest.mark.parametrize(("old", "now"), [("true", "full"), ("false", "none")])
def test_an_old_value_of_checkpointing_is_read_and_told(
    old: str, now: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mode with its present name is not reported."""
    file = tmp_path / f"{old}.yaml"
    file.write_text(f"model: {{checkpointing: {old}}}\n")
    assert load_recipe(file).recipe.model.checkpointing == now
    said = capsys.readouterr().err
    told = f"model.checkpointing={old} ({file}:1) has new values: it is read as model.checkpointing={now}"
    assert told in said
    assert load_recipe(file, ["model.checkpointing=selective"]).recipe.model.checkpointing == "selective"
    assert "selective" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="none, selective or full"):
        load_recipe(file, ["model.checkpointing=half"])
