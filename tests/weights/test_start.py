"""Tests of starting from other projects' weights: losses, tokens and features equal those of the source."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.recipe import Recipe
from mimae.errors import RunError
from mimae.model.encoder import Encoder
from mimae.model.masking import draw
from mimae.model.mimae import MIMAE
from mimae.model.units import Model
from mimae.randomness import initialise, whole_parts
from mimae.train.tasks.pretrain import Pretrain, pretrain
from mimae.weights.names import to_mae, to_timm, to_transformers
from mimae.weights.open import open_source
from mimae.weights.start import fit, place
from tests.oracles.mae_oracle import mae_loss
from tests.weights.conftest import Weights, encoder_of, recipe

CPU = torch.device("cpu")


def started(asked: Recipe) -> tuple[MIMAE, Pretrain]:
    """Return the model of a new run before its first step."""
    from mimae import distributed

    task = Pretrain(asked)
    distributed.setup()
    try:
        return task.engine(CPU).model, task
    finally:
        distributed.shutdown()


def pixels(count: int = 3, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def normalised(model: MIMAE, images: Tensor) -> Tensor:
    return ((images / 255 - model.encoder.mean) / model.encoder.std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_file_of_mae_gives_its_loss(weights: Weights, images: Path, tmp_path: Path, normalize: bool) -> None:
    """Compare with an independent forward pass of the weights in float64."""
    torch.save({"model": to_mae(weights), "optimizer": {}, "epoch": 7}, tmp_path / "mae_full.pth")
    asked = recipe(
        images, tmp_path / "run", f"model.init={tmp_path / 'mae_full.pth'}", f"objective.normalize_pixels={normalize}"
    )
    model, task = started(asked)
    assert task.fit is not None and task.fit.has_decoder and not task.fit.left
    visible, hidden = draw(asked.masking, 0, 0, torch.arange(3), model.encoder.grid)
    with torch.no_grad():
        loss = model(pixels(), visible, hidden).loss.item()
    wanted = mae_loss(
        {name: tensor.double() for name, tensor in weights.items()},
        pixels(),
        visible[:, 0],
        patch=4,
        heads=3,
        decoder_heads=2,
        mean=asked.data.mean,
        std=asked.data.std,
        normalize=normalize,
    ).item()
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_a_vit_of_timm_with_learned_positions_gives_its_tokens(weights: Weights, images: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    vit.load_state_dict(to_timm(encoder_of(weights)), strict=False)
    vit.state_dict()["pos_embed"].normal_(0, 0.5)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    model, task = started(recipe(images, tmp_path / "run", f"model.init={tmp_path / 'model.safetensors'}"))
    for name, tensor in vit.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(model.state_dict()[f"encoder.{name}"], tensor), name
    assert task.fit is not None and set(task.fit.left) == {"head.weight", "head.bias"}
    with torch.no_grad():
        wanted = vit.forward_features(normalised(model, pixels()))
        assert torch.dist(model.encoder.tokens(pixels()), wanted, float("inf")) < 1e-5
        assert torch.dist(model.encoder.features(pixels()), wanted[:, 1:].mean(1), float("inf")) < 1e-5


@pytest.fixture(scope="module")
def spellings(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Load folders of transformers with the tensor names of the hub, of the modules in memory, and of saved files."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("spellings")
    config = transformers.ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
    )
    for name in ("hub", "memory"):
        config.save_pretrained(folder / name)
    hub = {name: tensor.contiguous() for name, tensor in to_transformers(weights).items()}
    save_file(hub, folder / "hub" / "model.safetensors", {"format": "pt"})
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder / "hub")
    theirs.save_pretrained(folder / "saved")
    save_file(theirs.state_dict(), folder / "memory" / "model.safetensors", {"format": "pt"})
    return {name: folder / name for name in ("hub", "memory", "saved")}


def test_all_spellings_of_transformers_give_its_loss(spellings: dict[str, Path], images: Path, tmp_path: Path) -> None:
    import transformers

    theirs = transformers.ViTMAEForPreTraining.from_pretrained(spellings["hub"]).eval()
    for name, folder in spellings.items():
        asked = recipe(images, tmp_path / name, f"model.init={folder}")
        model, task = started(asked)
        assert task.fit is not None and task.fit.has_decoder and not task.fit.left and not task.fit.notes
        visible, hidden = draw(asked.masking, 0, 0, torch.arange(3), model.encoder.grid)
        order = torch.cat([visible[:, 0], hidden[:, 0]], 1).long()
        noise = torch.zeros(3, 16).scatter(1, order, torch.linspace(0, 1, 16).expand(3, 16))
        with torch.no_grad():
            wanted = theirs(normalised(model, pixels()), noise=noise).loss.item()
            assert model(pixels(), visible, hidden).loss.item() == pytest.approx(wanted, rel=1e-5), name


class Classifier(Model):
    """Load a model of another task, with learned positions, a norm after the mean, and a head."""

    def __init__(self, asked: Recipe) -> None:
        super().__init__()
        data = asked.data
        self.encoder = Encoder(asked.model, data.size_hw, data.mean, data.std, learned_positions=True)
        self.encoder.norm = torch.nn.Identity()  # type: ignore[assignment]
        self.fc_norm, self.head = torch.nn.LayerNorm(24), torch.nn.Linear(24, 5)

    def units(self) -> list[torch.nn.Module]:
        return list(self.encoder.blocks)


def test_a_model_of_another_task_starts_with_the_encoder(weights: Weights, images: Path, tmp_path: Path) -> None:
    """Resize the position table, which is a parameter with another size than in the source."""
    torch.save(to_mae(weights), tmp_path / "mae_full.pth")
    asked = recipe(images, tmp_path / "run", "data.image_size=24")
    model = Classifier(asked)
    initialise(model, 0)
    parts = whole_parts(model)
    found = fit(open_source(str(tmp_path / "mae_full.pth")), model, parts)
    place(found, model, parts)
    wanted = resample_abs_pos_embed(weights["encoder.pos_embed"], [6, 6], [4, 4], antialias=False)
    assert torch.allclose(model.encoder.pos_embed, wanted, atol=1e-6)
    assert torch.equal(
        model.state_dict()["encoder.blocks.1.mlp.fc2.weight"], weights["encoder.blocks.1.mlp.fc2.weight"]
    )
    assert set(found.new) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert {"encoder.norm.weight", "decoder.mask_token"} <= set(found.left)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_were_rounded_start_a_run_with_their_decoder(
    weights: Weights, images: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    theirs = {name: tensor.to(dtype) for name, tensor in to_mae(weights).items()}
    torch.save(theirs, tmp_path / "half.pth")
    model, _ = started(recipe(images, tmp_path / "run", f"model.init={tmp_path / 'half.pth'}"))
    assert torch.equal(model.decoder.embed.weight, theirs["decoder_embed.weight"].float())


def test_other_sizes_are_interpolated_as_mae_does(weights: Weights, images: Path, tmp_path: Path) -> None:
    """Compare with timm's function without antialiasing, which MAE's code does not use."""
    learned = weights | {"encoder.pos_embed": torch.randn(1, 17, 24)}
    torch.save(to_mae(encoder_of(learned)), tmp_path / "vit.pth")
    asked = recipe(images, tmp_path / "run", f"model.init={tmp_path / 'vit.pth'}", "data.image_size=[24, 48]")
    model, task = started(asked)
    wanted = resample_abs_pos_embed(learned["encoder.pos_embed"], [6, 12], [4, 4], antialias=False)
    assert torch.allclose(model.encoder.pos_embed, wanted, atol=1e-6)
    assert task.fit is not None and task.fit.interpolated == ["positions 4 x 4 -> 6 x 12"]


def test_a_smaller_patch_sees_an_enlarged_image_as_before(weights: Weights, images: Path, tmp_path: Path) -> None:
    torch.save(to_mae(encoder_of(weights)), tmp_path / "vit.pth")
    way = [f"model.init={tmp_path / 'vit.pth'}", "model.patch_size=8", "data.image_size=32"]
    model, task = started(recipe(images, tmp_path / "run", *way))
    weight = model.state_dict()["encoder.patch_embed.proj.weight"]
    small = torch.randn(1, 3, 4, 4)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic", antialias=True)
    before = (weights["encoder.patch_embed.proj.weight"] * small).sum((1, 2, 3))
    assert torch.allclose((weight * large).sum((1, 2, 3)), before, atol=1e-3)
    assert task.fit is not None and any("rough start" in note for note in task.fit.notes)


def test_a_run_goes_on_from_a_run_and_keeps_what_it_came_from(
    weights: Weights, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mae_pretrain_vit_tiny.pth"
    torch.save({"model": to_mae(encoder_of(weights))}, source)
    first, second = tmp_path / "first", tmp_path / "second"
    assert pretrain(recipe(images, first, f"model.init={source}", "ema.decay=0.5")).finished
    said = capsys.readouterr().out
    assert "placed, " in said and "new, from the seed: decoder (31 tensors)" in said and "CC-BY-NC-4.0" in said
    kept = json.loads((first / "init.json").read_text())
    assert kept["files"][source.name]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert kept["licence"] == "CC-BY-NC-4.0" and len(kept["placed"]) == 30 and "decoder.mask_token" in kept["new"]

    pretrain(recipe(images, second, f"model.init={first}"))
    assert json.loads((second / "init.json").read_text())["licence"] == "CC-BY-NC-4.0", "it is inherited"
    for init, section in ((str(first), "model."), (f"average:{first}", "ema.")):
        found = checkpoint.find(first)
        assert found is not None
        model, _ = started(recipe(images, tmp_path / "other", f"model.init={init}"))
        for name, tensor in found.tensors(section[:-1]).items():
            if "gate" in name:  # it is measured again
                continue
            assert torch.equal(model.state_dict()[name], tensor), (section, name)


def test_a_resumed_run_does_not_need_its_source(weights: Weights, images: Path, tmp_path: Path) -> None:
    source, run, whole = tmp_path / "mae.pth", tmp_path / "run", tmp_path / "whole"
    torch.save({"model": to_mae(weights)}, source)
    way = f"model.init={source}"
    pretrain(recipe(images, whole, way))
    pretrain(recipe(images, run, way, "run.dry=true"))
    kept = (run / "init.json").read_text()
    source.unlink()
    assert pretrain(recipe(images, run, way)).finished
    assert (run / "init.json").read_text() == kept
    found = [checkpoint.find(each) for each in (whole, run)]
    assert found[0] is not None and found[1] is not None
    for name, tensor in found[0].tensors("model").items():
        assert torch.equal(found[1].tensors("model")[name].nan_to_num(), tensor.nan_to_num()), name
    with pytest.raises(RunError, match=r"model.init: .* in the run, None now"):
        pretrain(recipe(images, run))


@pytest.mark.slow
def test_it_is_measured_which_pixels_a_decoder_predicts(images: Path, tmp_path: Path) -> None:
    """Distinguish weights that predict raw pixels from weights of equal shapes that predict normalised ones."""
    flat = tmp_path / "flat"
    flat.mkdir()
    from PIL import Image

    for i in range(24):  # each image has one colour, so that raw pixels are learned in a few steps
        Image.fromarray(np.full((20, 20, 3), 10 * i, np.uint8)).save(flat / f"{i}.png")
    learned = ["schedule.epochs=30", "schedule.max_steps=null", "optimizer.learning_rate=0.3"]
    taught = tmp_path / "taught"
    pretrain(recipe(flat, taught, "objective.normalize_pixels=false", *learned))
    state = {name: t for name, t in mimae_tensors(taught).items() if not name.startswith("objective.")}
    torch.save(to_mae(state), tmp_path / "unknown.pth")
    for normalize, verdict in ((False, "as objective.normalize_pixels=false asks"), (True, "WARNING: L_rec")):
        run = tmp_path / str(normalize)
        pretrain(
            recipe(
                flat,
                run,
                f"model.init={tmp_path / 'unknown.pth'}",
                f"objective.normalize_pixels={str(normalize).lower()}",
            )
        )
        kept = json.loads((run / "init.json").read_text())
        assert any(verdict in note and "it predicts raw pixels" in note for note in kept["notes"]), kept["notes"]
        shares = kept["reconstruction"]["share_of_zeros"]
        assert shares["raw"] < 0.9 <= shares["normalised"]


def mimae_tensors(run: Path) -> Weights:
    found = checkpoint.find(run)
    assert found is not None
    return found.tensors("model")


def refusal(source: Any, images: Path, tmp_path: Path) -> str:
    with pytest.raises(RunError) as caught:
        started(recipe(images, tmp_path / "run", f"model.init={source}"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Code:
    """Object whose pickle calls a function when it is loaded."""

    def __reduce__(self) -> Any:
        return (print, ("this ran",))


def test_files_of_strangers_are_one_sentence_each(
    weights: Weights, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = to_mae(weights)
    torch.save({"model": theirs, "args": argparse.Namespace(lr=np.float64(1))}, tmp_path / "good.pth")
    started(recipe(images, tmp_path / "run", f"model.init={tmp_path / 'good.pth'}"))
    good = (tmp_path / "good.pth").read_bytes()

    def made(name: str, content: Any) -> Path:
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        return file

    wide = {name: tensor.repeat_interleave(2, 0) for name, tensor in theirs.items() if "norm" in name}
    nan = theirs | {"norm.bias": torch.full((24,), torch.nan)}
    cases = {
        "torn": (good[:5000], "is damaged"),
        "garbage": (bytes(range(256)) * 9, "is not a file of torch.save or safetensors"),
        "empty": (b"", "is damaged (0 bytes)"),
        "code": ({"model": theirs, "more": Code()}, "contains Python objects, whose loading would run code: "),
        "text.safetensors": (b"I am text.\n" * 9, "is not a safetensors file"),
        "nothing": ({"epoch": 3}, "holds epoch, and no weights"),
        "convolutions": ({"conv1.weight": torch.zeros(4, 3, 7, 7)}, "holds no weights of a ViT"),
        "wide": (theirs | wide | {"patch_embed.proj.weight": torch.zeros(48, 3, 4, 4)}, "model.width=48"),
        "shallow": ({n: t for n, t in theirs.items() if "blocks.1" not in n}, "depth 1 instead of 2; set model.depth"),
        "channels": (theirs | {"patch_embed.proj.weight": torch.zeros(24, 4, 4, 4)}, "images of 4 channels"),
        "layerscale": (theirs | {"blocks.0.ls1.gamma": torch.zeros(24)}, "LayerScale"),
        "registers": (theirs | {"reg_token": torch.zeros(1, 4, 24)}, "register tokens"),
        "qk-norm": (theirs | {"blocks.0.attn.q_norm.weight": torch.zeros(8)}, "qk-norm"),
        "swiglu": (theirs | {"blocks.0.mlp.fc1_g.weight": torch.zeros(96, 24)}, "SwiGLU"),
        "packed": (theirs | {"blocks.0.mlp.fc1.weight": torch.zeros(192, 24)}, "SwiGLU"),
        "not-square": (theirs | {"pos_embed": torch.zeros(1, 13, 24)}, "fit neither a square grid"),
        "nan": (nan, "encoder.norm.bias holds numbers that are not finite"),
        "half": ({n: t for n, t in theirs.items() if n != "blocks.0.mlp.fc2.weight"}, "it is incomplete"),
        "quantised": ({n: (t.to(torch.int8) if t.dim() == 2 else t) for n, t in theirs.items()}, "of type int8; legal"),
        "complex": (theirs | {"norm.weight": torch.zeros(24, dtype=torch.complex64)}, "of type complex64"),
        "positions": (theirs | {"decoder_pos_embed": torch.zeros(1, 17, 16)}, "not the fixed sin-cos positions"),
    }
    for name, (content, words) in cases.items():
        assert words in refusal(made(name, content), images, tmp_path), name
    assert "this ran" not in capsys.readouterr().out
    assert "there is no file or folder" in refusal(tmp_path / "nowhere", images, tmp_path)
    assert "there is no file or folder facebook/vit-mae-base; mimae down" in refusal(
        "facebook/vit-mae-base", images, tmp_path
    )
    assert "environment variable NOWHERE is not set" in refusal("$NOWHERE/x.pth", images, tmp_path)
    assert "the folder has no file of weights" in refusal(images, images, tmp_path)
    assert "not in timm's cache" in refusal("timm:vit_base_patch16_224.mae", images, tmp_path)
