"""Tests of the objective against brute force in float64, on one rank and on several ranks."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimae import distributed, kernels
from mimae.config.load import load_recipe
from mimae.data.settings import DataSettings
from mimae.engines.ddp import DDPEngine
from mimae.engines.make import setup_of
from mimae.model.geometry import Grid
from mimae.model.groups import groups
from mimae.model.masking import draw
from mimae.model.mimae import MIMAE
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings
from mimae.objective import club, infonce
from mimae.objective.club import CLUB
from mimae.objective.gate import Gate
from mimae.objective.infonce import InfoNCE
from mimae.objective.settings import ObjectiveSettings
from mimae.randomness import initialise
from tests.oracles import club_oracle, infonce_oracle
from tests.rank_processes import run_ranks
from tests.rounding import DRAWS, excess, nudge


def latents(images: int = 5, views: int = 3, width: int = 7) -> Tensor:
    """Return z (B, N, D) float64 with means far from zero and unequal spreads, so that standardisation matters."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(images, views, width, generator=generator, dtype=torch.float64)
    return (z * torch.linspace(0.1, 2, width, dtype=torch.float64) + 3).requires_grad_()


def posterior(images: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    """Return mu and log s2 (B, D), which differ between images."""
    generator = torch.Generator().manual_seed(2)
    mu, log_s2 = torch.randn(2, images, width, generator=generator, dtype=torch.float64)
    return mu.requires_grad_(), log_s2.requires_grad_()


def test_club_is_the_pairwise_definition_with_its_gradient_through_the_moments() -> None:
    z, (mu, log_s2) = latents(), posterior()
    club, _ = CLUB.apply(z, mu, log_s2, kernels.view_latents(z[:, :, None])[2])
    expected = club_oracle.club(club_oracle.standardised(z, 1e-6), mu.detach(), log_s2.detach())
    assert abs(club - expected) < 1e-12
    (gradient,) = torch.autograd.grad(club, z)
    (wanted,) = torch.autograd.grad(expected, z)
    assert wanted.abs().max() > 1e-2
    assert (gradient - wanted).abs().max() < 1e-12


def test_club_trains_the_latents_alone_and_the_likelihood_v_alone() -> None:
    z, (mu, log_s2) = latents(), posterior()
    club, nll = CLUB.apply(z, mu, log_s2, kernels.view_latents(z[:, :, None])[2])
    expected = club_oracle.l_fit(club_oracle.standardised(z, 1e-6), mu, log_s2)
    assert abs(nll - expected) < 1e-12
    gradients = torch.autograd.grad(nll, (z, mu, log_s2), retain_graph=True)
    wanted = torch.autograd.grad(expected, (mu, log_s2))
    assert gradients[0].abs().max() == 0
    for got, want in zip(gradients[1:], wanted, strict=True):
        assert (got - want).abs().max() < 1e-12
    for gradient in torch.autograd.grad(club, (mu, log_s2)):
        assert gradient.abs().max() == 0


def test_club_of_a_constant_posterior_is_zero() -> None:
    z = latents()
    mu, log_s2 = torch.zeros(5, 7, dtype=torch.float64), torch.ones(5, 7, dtype=torch.float64)
    club, _ = CLUB.apply(z, mu, log_s2, kernels.view_latents(z[:, :, None])[2])
    assert abs(club) < 1e-12


@pytest.mark.parametrize("tau", [0.05, 1.0], ids=["peaked", "flat"])
def test_infonce_is_cross_entropy_over_ordered_pairs(tau: float) -> None:
    temperature = torch.tensor([tau], dtype=torch.float64, requires_grad=True)
    z = (latents() - 3).detach().requires_grad_()
    u = F.normalize(z, dim=-1)
    loss = InfoNCE.apply(u, u, temperature)
    expected = infonce_oracle.l_max(z, temperature)
    assert abs(loss - expected) < 1e-12
    for got, want in zip(
        torch.autograd.grad(loss, (z, temperature)), torch.autograd.grad(expected, (z, temperature)), strict=True
    ):
        assert (got - want).abs().max() < 1e-12


def test_infonce_of_equal_latents_is_log_batch() -> None:
    u = F.normalize(torch.ones(6, 2, 4, dtype=torch.float64), dim=-1)
    assert abs(InfoNCE.apply(u, u, torch.tensor([0.07], dtype=torch.float64)) - math.log(6)) < 1e-12


def test_moments_merge_as_those_of_the_whole() -> None:
    """Chan's formula is tested on parts whose means differ strongly."""
    parts = [torch.randn(4, 3, dtype=torch.float64) + 100 * i for i in range(3)]
    gathered = torch.cat([torch.stack([p.mean(0), (p - p.mean(0)).square().sum(0)]) for p in parts])
    mean, variance = club.global_moments(gathered, 4)
    whole = torch.cat(parts)
    assert (mean - whole.mean(0)).abs().max() < 1e-12
    assert (variance - whole.var(0, correction=0)).abs().max() < 1e-10


def test_gate_opens_a_step_after_the_average_falls_below_and_stays_open() -> None:
    gate, taken = Gate(0.5), torch.tensor(0.0)
    for rec in (1.0, float("nan"), 0.4):
        gate.update(torch.tensor(rec), taken)
        assert gate.weight == 0
    gate.update(torch.tensor(9.0), skipped=torch.tensor(1.0))
    assert abs(gate.average - (0.99 * 1.0 + 0.01 * 0.4)) < 1e-6, (
        "starts at the first loss, skips the NaN and what is skipped"
    )
    for _ in range(300):
        gate.update(torch.tensor(0.4), taken)
    assert gate.weight == 1
    gate.update(torch.tensor(1e6), taken)
    assert gate.weight == 1
    assert Gate(None).weight == 1


GLOBAL_BATCH = 12  # It is divisible by 2 and 3 ranks, with more than one image on each.


def _model(dtype: torch.dtype) -> MIMAE:
    with torch.device("meta"):
        model = MIMAE(
            DataSettings(image_size=[8, 12]),
            MaskingSettings(num_masks=3, ratio=2 / 3),
            ModelSettings(patch_size=4, width=16, depth=1, heads=2),
            DecoderSettings(width=8, depth=1, heads=2),
            ObjectiveSettings(
                max_mi=0.3, min_mi=0.7, temperature=0.2, learn_temperature=True, projector="mlp", posterior_width=5
            ),
        )
    return model.to(dtype)


def _engine(dtype: torch.dtype) -> DDPEngine[MIMAE]:
    recipe = load_recipe({"precision": "fp32", "schedule": {"batch_size": GLOBAL_BATCH}}).recipe
    rule = groups(recipe.optimizer, GLOBAL_BATCH, 3)
    return DDPEngine(
        _model(dtype), setup_of(recipe), torch.device("cpu"), rule, lambda model, parts: initialise(model, 0, parts)
    )


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's part of a global batch of distinct images: images, visible, hidden."""
    world_size, rank = distributed.world_size(), distributed.rank()
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 8, 12, 3), generator=generator, dtype=torch.uint8)
    ids = torch.arange(GLOBAL_BATCH)
    share = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    return images[share], *draw(MaskingSettings(num_masks=3, ratio=2 / 3), 0, 0, ids[share], Grid(2, 3, 4))


def _engine_gradients(dtype: torch.dtype, drop_factor: bool = False, draw: int | None = None) -> dict[str, Tensor]:
    """Return this rank's gradients after the engine's reduction, for its part of the global batch, and the losses.

    `drop_factor` makes the mistake that the tests must detect: the factor W of the MI terms is missing. `draw` changes
    the weights in their last bit.
    """
    world_size = distributed.world_size()
    if drop_factor:
        whole = InfoNCE.backward
        vars(infonce)["InfoNCE"].backward = staticmethod(lambda ctx, grad: whole(ctx, grad / world_size))
    engine = _engine(dtype)
    if draw is not None:
        nudge(engine.model.parameters(), draw)
    losses = engine.forward(*_batch())
    engine.backward(losses.loss)
    if drop_factor:
        vars(infonce)["InfoNCE"].backward = staticmethod(whole)
    result = {name: p.grad.clone() for name, p in engine.model.named_parameters()}
    reported = {f"loss.{key}": value for key, value in losses.columns.items()}
    return result | reported


def _decoded_before_others_gather(folder: Path) -> bool:
    """Return whether rank 0 finishes its decoder before any other rank starts to gather latents."""
    model, decoded = _engine(torch.float32).model, folder / "decoded"
    seen = []

    def hold(*_: object) -> None:
        give_up = time.monotonic() + 10
        while not decoded.exists() and time.monotonic() < give_up:
            time.sleep(0.01)
        seen.append(decoded.exists())

    if distributed.rank() == 0:
        model.decoder.register_forward_hook(lambda *_: decoded.touch())
    else:
        model.encoder.register_forward_hook(hold)
    model(*_batch())
    return all(seen)


def _checks(folder: Path) -> dict[str, Any]:
    return {
        "float64": _engine_gradients(torch.float64),
        "fp32": _engine_gradients(torch.float32),
        "without W": _engine_gradients(torch.float32, drop_factor=True),
        "decoded first": _decoded_before_others_gather(folder),
    }


def _results(factory: pytest.TempPathFactory, world_size: int) -> list[dict[str, Any]]:
    folder = factory.mktemp("ranks")
    return run_ranks(world_size, folder, _checks, folder)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _results(tmp_path_factory, 1)[0]


@pytest.fixture(scope="module")
def nudged() -> list[dict[str, Tensor]]:
    """Return the results of one process in fp32 from weights that are changed in their last bit."""
    distributed.setup()
    try:
        return [_engine_gradients(torch.float32, draw=draw) for draw in range(DRAWS)]
    finally:
        distributed.shutdown()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _results(tmp_path_factory, request.param)


def test_latents_are_gathered_beside_the_decoder(ranks: list[dict[str, Any]]) -> None:
    assert all(result["decoded first"] for result in ranks)


def test_ranks_have_the_gradients_and_losses_of_one_process(
    ranks: list[dict[str, Any]], one_process: dict[str, Any], nudged: list[dict[str, Tensor]]
) -> None:
    """Gradients of all parameters are compared after the engine's reduction: also V, projector and temperature."""
    for result in ranks:
        assert all(torch.dist(result["float64"][name], want) < 1e-10 for name, want in one_process["float64"].items())
        assert excess(result["fp32"], one_process["fp32"], nudged) < 1
        assert excess(result["without W"], one_process["fp32"], nudged) > 1000, "a missing factor W is not seen"
