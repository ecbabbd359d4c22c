"""Tests of `mimae export`: other libraries open its folders, and their encoder equals the exported one."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors import safe_open

from mimae.config.load import load_recipe
from mimae.config.recipe import ClassifyRecipe
from mimae.errors import CheckpointError, UserError
from mimae.model.mimae import build
from mimae.model.portable import Form
from mimae.train import trained
from mimae.train.tasks.registry import make_task
from mimae.train.trainer import train
from mimae.transfer import export as module
from mimae.transfer.export import TARGETS, export
from mimae.transfer.load import load_encoder, load_model
from mimae.transfer.targets.base import Exported, Options
from tests.transfer.conftest import TINY

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")


@pytest.fixture(scope="session")
def square(made: Callable[..., Path]) -> Path:
    """Return a run with square images and one view, as in MAE."""
    return made("data.image_size=16", "masking.num_masks=1", "objective.max_mi=0", "objective.min_mi=0")


def features(folder: Path, size: tuple[int, int], average: bool = False) -> torch.Tensor:
    images = torch.randint(0, 256, (2, *size, 3), generator=torch.Generator().manual_seed(3)).byte()
    with torch.no_grad():
        return load_encoder(folder, average).features(images)


@pytest.mark.parametrize("to", ["timm", "transformers", "safetensors"])
def test_images_that_are_not_square_go_out_and_come_back(run: Path, tmp_path: Path, to: str) -> None:
    report = export(run, to, tmp_path / to, Options())
    assert report.differences is not None and set(report.differences) == {"tokens", "features"}
    assert max(report.differences.values()) < 1e-5 and report.rounding is None
    assert torch.equal(features(tmp_path / to, (8, 12)), features(run, (8, 12)))
    with pytest.raises(CheckpointError, match="is an export, which has only one set of weights"):
        load_encoder(tmp_path / to, average=True)
    assert list(tmp_path.iterdir()) == [tmp_path / to]
    assert (tmp_path / to / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("to", ["mae", "transformers"])
def test_the_decoder_of_the_average_goes_along(square: Path, tmp_path: Path, to: str) -> None:
    report = export(square, to, tmp_path / to, Options(decoder=True), average=True)
    assert report.differences is not None and max(report.differences.values()) < 1e-5
    assert to == "mae" or {"predictions", "loss"} < set(report.differences)
    assert torch.equal(features(tmp_path / to, (16, 16)), features(square, (16, 16), average=True))
    assert not torch.equal(features(tmp_path / to, (16, 16)), features(square, (16, 16)))
    assert "the moving average" in (tmp_path / to / "README.md").read_text()


def test_timm_pools_as_the_card_says(run: Path, tmp_path: Path) -> None:
    """Run the code of the model card as a user would, with fine-tuning head, another size and other channels."""
    out = tmp_path / "timm"
    export(run, "timm", out, Options())
    tuned: Any = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5, img_size=(16, 12), in_chans=5)
    assert tuned(torch.zeros(1, 5, 16, 12)).shape == (1, 5)
    assert timm.data.resolve_model_data_config(tuned)["mean"] == [0.4, 0.5, 0.6]
    card = (out / "README.md").read_text()
    assert 'timm.create_model("local-dir:timm", pretrained=True)' in card and card.startswith("---\ntags:")
    assert "without the class token" in card and "8 x 12 px (height x width)" in card and "No licence was" in card


def test_the_licence_of_the_first_weights_is_inherited(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "init.json").write_text(json.dumps({"licence": "CC-BY-NC-4.0"}))
    export(copy, "safetensors", tmp_path / "out", Options())
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: CC-BY-NC-4.0\n") and "CC-BY-NC-4.0, inherited from" in card


def test_bf16_is_rounded_once_and_its_rounding_is_told(run: Path, tmp_path: Path) -> None:
    report = export(run, "safetensors", tmp_path / "out", Options(torch.bfloat16))
    assert report.rounding is not None and 1e-4 < report.rounding < module.ROUNDING
    assert report.differences is not None and max(report.differences.values()) < 1e-5
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_outputs_that_differ_are_no_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reject a folder whose weights differ from the run's, and one whose outputs are NaN."""
    target = TARGETS["safetensors"]

    def spoil(value: float) -> Callable[..., None]:
        def write(exported: Exported, options: Options, folder: Path) -> None:
            with torch.no_grad():
                bias = exported.encoder.norm.bias
                kept, _ = bias.clone(), bias.fill_(value)
                target.write(exported, options, folder)
                bias.copy_(kept)

        return write

    for value in (1.0, float("nan")):
        monkeypatch.setitem(TARGETS, "safetensors", target._replace(write=spoil(value)))
        with pytest.raises(UserError, match=r"not exported: .* differ from the model by more than 1e-04 \(tokens"):
            export(run, "safetensors", tmp_path / "out", Options())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("mae", Options(), "takes only square images, but this run's have 8 x 12 pixels"),
        ("transformers", Options(decoder=True), "ViTMAEForPreTraining takes only square images"),
        ("timm", Options(decoder=True), "--to timm has only the encoder; exports with the decoder are"),
        ("timm", Options(form=Form(blocks=(1,))), r"--blocks is for graphs \(onnx, torch\)"),
        ("safetensors", Options(form=Form(dynamic_size=True)), "--dynamic-size is for graphs"),
        ("torch", Options(torch.bfloat16), "--dtype bf16 rounds stored weights"),
        ("torch", Options(form=Form(blocks=(3,))), "--blocks 3: the encoder has blocks 0 to 2"),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_words(
    run: Path, tmp_path: Path, to: str, options: Options, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export(run, to, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_the_encoder_comes_out_of_runs_of_other_tasks_too(run: Path, images: Path, tmp_path: Path) -> None:
    """Export the frozen encoder of a classifier unchanged; refuse it where `fc_norm` replaced its norm."""
    shared = {key: TINY[key] for key in ("precision", "data", "model", "schedule", "telemetry", "checkpoint")}
    data = {**TINY["data"], "path": str(images), "max_bad_fraction": 1}
    settings = {**shared, "data": data}
    for norm in ("batch_norm", "fc_norm"):
        overrides = [f"run.dir={tmp_path / norm}", f"head.norm={norm}", "run.dry=true"]
        overrides += ["finetune.freeze=all", f"model.init={run}"] if norm == "batch_norm" else []
        recipe = load_recipe({"task": "classify", **settings}, overrides, None, ClassifyRecipe).recipe
        train(make_task(recipe))
    assert torch.equal(features(tmp_path / "batch_norm", (8, 12)), features(run, (8, 12)))
    with pytest.raises(CheckpointError, match=r"does not hold the encoder of config.yaml: .*norm.weight"):
        load_encoder(tmp_path / "fc_norm")


@pytest.mark.parametrize("to", ["mae", "transformers"])
@pytest.mark.parametrize("key", ["predict=next_view", "attention=cross"])
def test_decoders_that_mae_does_not_have_are_refused(tmp_path: Path, to: str, key: str) -> None:
    recipe = load_recipe(TINY, ["data.image_size=16", f"decoder.{key}"]).recipe
    with pytest.raises(UserError, match=rf"has decoder.{key}, but .* supports only .*leave out --decoder"):
        TARGETS[to].write(Exported(recipe, build(recipe)), Options(decoder=True), tmp_path)


def test_a_size_that_settings_claim_is_compared_before_memory_is_taken(run: Path, tmp_path: Path) -> None:
    """The claimed model would need more than 100 TB."""
    shutil.copytree(run, tmp_path / "run")
    kept = yaml.safe_load((run / "config.yaml").read_text())
    kept["model"] |= {"width": 3 << 17, "depth": 24}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(kept))
    for read in (load_encoder, load_model, trained.load):
        with pytest.raises(
            CheckpointError, match=r"does not hold the \w+ of config.yaml: \S+ has the shape .* needs .*393216"
        ):
            read(tmp_path / "run")
    export(run, "safetensors", tmp_path / "out", Options())
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["mimae"] |= {"width": 3 << 17, "depth": 24}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cannot be opened as an export: ValueError: \S+ has the shape .*393216"):
        load_encoder(tmp_path / "out")


def test_a_folder_that_is_there_stays(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export(run, "timm", tmp_path, Options())
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="exists already"):
        export(run, "timm", tmp_path / "link", Options())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit"}, "its config.json does not name mimae"),
        ({"mimae": {"patch_size": 4}}, "cannot be opened as an export: KeyError: 'width'"),
    ],
)
def test_other_folders_are_no_exports(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        load_encoder(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("options", [Options(form=Form(blocks=(2, 0))), Options(form=Form("float", dynamic_size=True))])
def test_graphs_compute_by_themselves(run: Path, tmp_path: Path, to: str, options: Options) -> None:
    """Accept any batch size, return the blocks' maps in the requested order, and accept other sizes if dynamic."""
    report = export(run, to, tmp_path / "out", options)
    assert report.differences is not None and max(report.differences.values()) < 1e-5
    assert list(report.differences) == ["tokens", "features", *(f"block_{number}" for number in options.form.blocks)]
    assert torch.equal(features(tmp_path / "out", (8, 12)), features(run, (8, 12)))


ISOLATED = "import sys, runpy; sys.modules['mimae'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
"""Code that runs a script which cannot import mimae."""


@pytest.mark.slow
@pytest.mark.parametrize("to", [*(to for to in TARGETS if to != "onnx"), pytest.param("onnx", marks=needs_onnx)])
def test_check_runs_without_mimae(square: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    export(square, to, out, Options())
    command = [sys.executable, "-c", ISOLATED, str(out / "check.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "features: differs by" in done.stdout, done.stderr
    stored = dict(np.load(out / "check.npz"))
    np.savez(out / "check.npz", **{**stored, "features": stored["features"] + 1e-3})
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
