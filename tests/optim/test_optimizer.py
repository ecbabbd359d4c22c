"""Tests of AdamW against its formula for all implementations: groups, skipped steps, and exchange of states."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mimae.config.load import load_recipe
from mimae.model.groups import groups
from mimae.model.mimae import build
from mimae.optim.adamw import IMPLEMENTATIONS
from mimae.optim.groups import Group
from mimae.optim.optimizer import Optimizer
from mimae.optim.settings import OptimizerSettings
from mimae.randomness import whole_parts

CPU = torch.device("cpu")
BETAS, DECAY, RATE, POSTERIOR_RATE = (0.8, 0.9), 0.1, 0.02, 0.05


class Model(nn.Module):
    """A model with a matrix, a bias, a token, and V."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.mask_token = nn.Parameter(torch.randn(1, 1, 2))
        self.objective = nn.ModuleDict({"posterior": nn.Linear(2, 4)})


def optimizer(model: nn.Module, impl: str = "torch", decay_tokens: bool = False) -> Optimizer:
    settings = OptimizerSettings(
        impl=impl,
        learning_rate=RATE,
        posterior_learning_rate=POSTERIOR_RATE,
        weight_decay=DECAY,
        decay_tokens=decay_tokens,
        betas=BETAS,
    )
    return Optimizer(whole_parts(model), settings, groups(settings, 256, 1), next(model.parameters()).device)


def by_formula(
    start: dict[str, Tensor],
    steps: list[tuple[float, dict[str, Tensor]]],
    decayed: tuple[str, ...] = ("layer.weight",),  # a token is no matrix, and V is not decayed
) -> dict[str, Tensor]:
    """Return the weights after AdamW (Loshchilov and Hutter 2019) in float64; steps: (share of the peak, gradients)."""
    weights = {}
    for name, weight in start.items():
        w, m, v = weight.double(), torch.zeros_like(weight.double()), torch.zeros_like(weight.double())
        decay = DECAY if name in decayed else 0.0
        rate = POSTERIOR_RATE if "posterior" in name else RATE
        for t, (factor, gradients) in enumerate(steps, 1):
            g = gradients[name].double()
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
            update = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + 1e-8)
            w = w - rate * factor * (update + decay * w)
        weights[name] = w
    return weights


def take(model: nn.Module, given: Optimizer, steps: list[tuple[float, dict[str, Tensor]]]) -> list[float]:
    """Take the steps, and return which of them were skipped."""
    skipped = []
    for factor, gradients in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        skipped.append(given.step(factor).skipped.item())
    return skipped


def some_steps(model: nn.Module) -> list[tuple[float, dict[str, Tensor]]]:
    """Return six steps. The first one is not finite only in V, the fourth one only in one weight."""
    generator = torch.Generator().manual_seed(1)
    steps = [
        (0.25 * (i + 1), {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()})
        for i in range(6)
    ]
    steps[0][1]["objective.posterior.bias"][1] = float("nan")
    steps[3][1]["layer.weight"][0, 0] = float("inf")
    return steps


class ApexFusedAdam(torch.optim.Optimizer):
    """A replacement of apex's FusedAdam(capturable=True), which needs a GPU.

    It has the same arithmetic and counts steps in the same way: a flag is set from the scaler after the count, for each
    group.
    """

    def __init__(self, groups: Any, betas: tuple[float, float], capturable: bool) -> None:
        assert capturable
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)

    @torch.no_grad()
    def step(self, grad_scaler: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[CPU])
            scale = grad_scaler._get_scale_async()
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                if self._dummy_overflow_buf != 1:
                    assert isinstance(group["lr"], Tensor), "the rate has to be on the device"
                    fused_adam(p, p.grad / scale, state, group, int(group["step"]))


class DeepSpeedCPUAdam(torch.optim.Optimizer):
    """A replacement of DeepSpeed's optimizer, which has to be built: the same arithmetic, with counts on the host."""

    def __init__(self, groups: Any, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                assert isinstance(state["step"], int)
                state["step"] += 1
                fused_adam(p, p.grad, state, group, state["step"])


def fused_adam(p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: int) -> None:
    (b1, b2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
    m.copy_(b1 * m + (1 - b1) * gradient)
    v.copy_(b2 * v + (1 - b2) * gradient**2)
    update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + group["eps"])
    p -= group["lr"] * (update + group["weight_decay"] * p)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, dict[str, Any]] = {
        "apex.optimizers": {"FusedAdam": ApexFusedAdam},
        "deepspeed.ops.adam": {"DeepSpeedCPUAdam": DeepSpeedCPUAdam},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("impl", ["auto", "torch", "apex", "deepspeed"])
def test_steps_are_adamws_and_skipped_ones_none(impl: str, stand_ins: None) -> None:
    model = Model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    given, steps = optimizer(model, impl), some_steps(model)
    assert take(model, given, steps) == [1, 0, 0, 1, 0, 0]
    taken = [step for i, step in enumerate(steps) if i not in (0, 3)]
    for name, expected in by_formula(start, taken).items():
        assert torch.dist(model.get_parameter(name).double(), expected) < 1e-6 * expected.norm(), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("later", ["torch", "apex", "deepspeed"])
@pytest.mark.parametrize("first", ["torch", "apex", "deepspeed"])
def test_a_run_goes_on_with_another_implementation(first: str, later: str, stand_ins: None) -> None:
    whole, begun = Model(), Model()
    steps = some_steps(whole)
    take(whole, optimizer(whole), steps)

    before = optimizer(begun, first)
    take(begun, before, steps[:4])  # The last of these steps is skipped.
    state = before.state_dict()
    assert set(state) == {
        f"{kind}.{n}" for kind in ("step", "exp_avg", "exp_avg_sq") for n, _ in begun.named_parameters()
    }
    assert all(state[f"step.{name}"] == 2 for name, _ in begun.named_parameters())
    resumed = Model()
    resumed.load_state_dict(begun.state_dict())
    after = optimizer(resumed, later)
    after.load_state_dict(state)
    take(resumed, after, steps[4:])
    for name, expected in whole.named_parameters():
        assert torch.dist(resumed.get_parameter(name), expected) < 1e-6 * expected.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "apex"])
def test_on_a_gpu(impl: str) -> None:
    device = torch.device("cuda")
    reason = IMPLEMENTATIONS[impl].obstacle(device)
    if reason is not None:
        pytest.skip(reason)
    model = Model().to(device)
    start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    steps = some_steps(model)
    on_device = [(factor, {name: g.to(device) for name, g in gradients.items()}) for factor, gradients in steps]
    assert take(model, optimizer(model, impl), on_device) == [1, 0, 0, 1, 0, 0]
    for name, expected in by_formula(start, [steps[i] for i in (1, 2, 4, 5)]).items():
        assert torch.dist(model.get_parameter(name).cpu().double(), expected) < 1e-6 * expected.norm(), name


# What cannot run


def package(monkeypatch: pytest.MonkeyPatch, folder: Path, *files: str) -> None:
    """Create an empty package with `files` in the first folder of the import path."""
    for file in ("__init__.py", *files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    monkeypatch.syspath_prepend(folder.parent)


def test_apex_has_to_be_nvidias_and_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apex = IMPLEMENTATIONS["apex"].obstacle
    assert "not installed" in str(apex(CPU))
    package(monkeypatch, tmp_path / "pypi/apex", "auth/models.py")
    assert "is not NVIDIA's" in str(apex(CPU))
    package(monkeypatch, tmp_path / "nvidia/apex", "optimizers/fused_adam.py")
    assert "needs a CUDA device" in str(apex(CPU))
    assert "without its CUDA extensions: " in str(apex(torch.device("cuda")))
    package(monkeypatch, tmp_path / "built/amp_C")
    assert apex(torch.device("cuda")) is None


def test_deepspeed_has_to_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed: Callable[[torch.device], str | None] = IMPLEMENTATIONS["deepspeed"].obstacle
    with monkeypatch.context() as without:
        without.setattr("mimae.optim.adamw.find_spec", lambda _: None)
        assert deepspeed(CPU) == "deepspeed is not installed"
    package(monkeypatch, tmp_path / "deepspeed")
    version: Any = SimpleNamespace(installed_ops={"cpu_adam": False}, accelerator_name="cpu")
    accelerator = SimpleNamespace(device_name=lambda: "cpu")
    monkeypatch.setitem(sys.modules, "deepspeed.git_version_info", version)
    monkeypatch.setitem(
        sys.modules,
        "deepspeed.accelerator",
        SimpleNamespace(get_accelerator=lambda: accelerator),  # type: ignore[arg-type]
    )
    assert "DS_BUILD_CPU_ADAM=1" in str(deepspeed(CPU))
    version.installed_ops = {"cpu_adam": True}
    assert deepspeed(CPU) is None
    assert "DS_BUILD_FUSED_ADAM=1" in str(deepspeed(torch.device("cuda")))
    version.accelerator_name = "cuda"  # It was built for another device, so DeepSpeed would build it again.
    assert "DS_BUILD_CPU_ADAM=1" in str(deepspeed(CPU))


# LARS


def lars(model: nn.Module, **settings: Any) -> Optimizer:
    """Return a rule with one learning rate, which LARS adapts for matrices, as published."""

    def rule(name: str, shape: torch.Size) -> Group:
        return Group(RATE, DECAY if len(shape) == 2 else 0.0, adapt=len(shape) == 2)

    return Optimizer(whole_parts(model), OptimizerSettings(kind="lars", **settings), rule, CPU)


def lars_by_formula(start: dict[str, Tensor], steps: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the weights after LARS (You et al. 2017) in float64; biases and tokens use only momentum."""
    weights = {}
    for name, weight in start.items():
        w, m = weight.double(), torch.zeros_like(weight.double())
        for factor, gradients in steps:
            g = gradients[name].double()
            if w.ndim == 2:
                g = g + DECAY * w
                g = g * 0.001 * (w.square().sum() / g.square().sum()).sqrt()
            m = 0.7 * m + g
            w = w - RATE * factor * m
        weights[name] = w
    return weights


def test_lars_is_its_formula_and_skipped_steps_are_none() -> None:
    model = Model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    given, steps = lars(model, momentum=0.7), some_steps(model)
    assert take(model, given, steps) == [1, 0, 0, 1, 0, 0]
    for name, expected in lars_by_formula(start, [steps[i] for i in (1, 2, 4, 5)]).items():
        assert torch.dist(model.get_parameter(name).double(), expected) < 1e-6 * expected.norm(), name
    assert all(given.state_dict()[f"step.{name}"] == 4 for name in start)


def test_lars_is_timms_with_its_two_groups() -> None:
    """timm can adapt a group without weight decay, as in the published recipe. Biases must not be adapted."""
    from timm.optim.lars import Lars as Timm

    ours, theirs = Model(), Model()
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    others = [p for p in theirs.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "always_adapt": True}, {"params": others, "always_adapt": False}]
    peer = Timm(groups, lr=RATE, momentum=0.9)

    def rule(name: str, shape: torch.Size) -> Group:
        return Group(RATE, 0.0, adapt=len(shape) == 2)

    given = Optimizer(whole_parts(ours), OptimizerSettings(kind="lars"), rule, CPU)
    for _, gradients in some_steps(ours)[1:3]:
        for model in (ours, theirs):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone()
        given.step(1.0)
        peer.step()
    for name, expected in theirs.named_parameters():
        assert torch.dist(ours.get_parameter(name), expected) < 1e-6 * expected.norm(), name


def test_lars_goes_on_from_its_state() -> None:
    whole, begun, resumed = Model(), Model(), Model()
    steps = some_steps(whole)
    take(whole, lars(whole), steps)
    before, after = lars(begun), lars(resumed)
    take(begun, before, steps[:3])
    resumed.load_state_dict(begun.state_dict())
    assert before.state_dict().keys() == after.empty_state().keys()
    after.load_state_dict(before.state_dict())
    take(resumed, after, steps[3:])
    assert all(torch.equal(resumed.get_parameter(name), p) for name, p in whole.named_parameters())


# Groups


def test_learning_rates_are_scaled_by_what_the_settings_count() -> None:
    peaks = {
        by: OptimizerSettings(scale_by=by, learning_rate=0.5).peak(0.5, images=512, views=4)
        for by in ("views", "images", "none")
    }
    assert peaks == {"views": 0.5 * 512 * 4 / 256, "images": 0.5 * 512 / 256, "none": 0.5}


def test_each_set_is_clipped_to_its_own_norm() -> None:
    """Only the first of two sets is scaled, because the second one is below the limit."""
    model = nn.Linear(2, 1)
    settings = OptimizerSettings(clip=1.0, kind="lars", momentum=0.0)

    def rule(name: str, shape: torch.Size) -> Group:
        return Group(1.0, 0.0, clip="main" if name == "weight" else "bias")

    given = Optimizer(whole_parts(model), settings, rule, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take(model, given, [(1.0, {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([0.5])})])
    moved = {name: (before[name] - p).detach() for name, p in model.named_parameters()}
    assert torch.allclose(moved["weight"], torch.tensor([[0.6, 0.8]]), atol=1e-5)
    assert torch.allclose(moved["bias"], torch.tensor([0.5]), atol=1e-6)


def test_tokens_are_decayed_where_asked_for() -> None:
    model = Model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = some_steps(model)[4:]
    take(model, optimizer(model, decay_tokens=True), steps)
    for name, expected in by_formula(start, steps, ("layer.weight", "mask_token")).items():
        assert torch.dist(model.get_parameter(name).double(), expected) < 1e-6 * expected.norm(), name


@pytest.mark.parametrize("decay_tokens", [False, True])
def test_with_tokens_the_groups_are_those_of_mae(decay_tokens: bool) -> None:
    """MAE's code uses the groups of timm, which decays every parameter with more than one dimension."""
    recipe = load_recipe("quickstart_mae", [f"optimizer.decay_tokens={decay_tokens}"]).recipe
    model = build(recipe)
    ours_of = Optimizer(
        whole_parts(model), recipe.optimizer, groups(recipe.optimizer, 128, 1), CPU
    ).stepper.optimizer.param_groups
    ours = {p for group in ours_of if group["weight_decay"] for p in group["params"]}
    theirs = {p for group in param_groups_weight_decay(model) if group["weight_decay"] for p in group["params"]}
    tokens = {model.encoder.cls_token, model.decoder.mask_token}
    assert ours == (theirs if decay_tokens else theirs - tokens) and tokens <= theirs
    assert {group["weight_decay"] for group in ours_of} == {0.0, 0.05}
