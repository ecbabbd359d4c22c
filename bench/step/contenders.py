"""The implementations whose training step is measured: this system, its eager baseline, the MAEs that people install.

Each starts from the batch that its own loader would give it (uint8 pixels for this system, normalised floats for the
others) and draws its masks itself.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimae.bench.baselines.eager import EagerMIMAE
from mimae.bench.baselines.peers import LightlyMAE, TransformersMAE
from mimae.bench.step.meters import timed
from mimae.config.recipe import Recipe
from mimae.engines.compiling import compile_units, will_compile
from mimae.errors import UserError
from mimae.model import attention_choice
from mimae.model.geometry import geometry
from mimae.model.groups import groups
from mimae.model.masking import views
from mimae.model.mimae import MIMAE
from mimae.optim.optimizer import Optimizer
from mimae.randomness import whole_parts

State = Mapping[str, Tensor]

Gradient = dict[str, float]
"""`loss` and `grad_norm` of one batch."""

OURS = "mimae"

BASELINES = {
    "eager": EagerMIMAE,
    "compiled": EagerMIMAE,
    "transformers": TransformersMAE,
    "lightly": LightlyMAE,
}

PLAIN = ("eager", "compiled")
"""The baselines of this method; with `compiled` every block is compiled, also where this system runs without."""

PEERS = ("transformers", "lightly")


ATTENTION = {"sdpa": True, "cudnn": True, "plain": False}
"""Ways of a baseline to compute attention, by name; whether it is torch's function. With `cudnn` that prefers cuDNN."""

ON_CPU = ("sdpa", "plain")
"""The ways that a baseline tries on a CPU. On a GPU plain attention would write all attention weights to memory."""

_CUDNN_FIRST = (
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
)

TRIALS = 2
"""Steps of a baseline with each of them, in turns. The best one counts; the first one may compile."""


class Contender(ABC):
    """An implementation with its optimizer, ready to take training steps on a fixed batch of images."""

    def __init__(self, recipe: Recipe, module: nn.Module, images: Tensor) -> None:
        """Set up the contender. `images` is the module's first argument, on its device."""
        self.recipe, self.module, self.images = recipe, module, images
        self.num_patches = geometry(recipe).grid.patches
        self.compiled = will_compile(recipe.compile, images.device)

    @abstractmethod
    def draw(self) -> tuple[Tensor, ...]:
        """Return new masks, as arguments of the module."""

    def forward(self, masks: Sequence[Tensor], precision: str) -> Tensor:
        """Return the loss."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = self.module(self.images, *masks)
        return output if isinstance(output, Tensor) else output.loss

    @abstractmethod
    def update(self) -> None:
        """Take an optimizer step, and clear the gradients."""

    @abstractmethod
    def compile_blocks(self) -> None:
        """Compile each transformer block."""

    def step(self) -> None:
        """Run a training step without a wait for the device."""
        self.forward(self.draw(), self.recipe.precision).backward()
        self.update()

    def warm_up(self) -> float:
        """Run the first steps, which compile and allocate, and return the approximate seconds of a later step."""
        if self.compiled:
            self.compile_blocks()
            self.timed(3)
        return self.timed(1)

    def timed(self, steps: int) -> float:
        """Return the seconds per step over `steps` steps."""
        return timed(self.step, steps)

    def gradient(self, masks: Sequence[Tensor], precision: str) -> Gradient:
        """Return loss and gradient norm with the given masks."""
        loss = self.forward(masks, precision)
        loss.backward()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        values = {"loss": loss.item(), "grad_norm": torch.nn.utils.get_total_norm(grads).item()}
        self.module.zero_grad()
        return values


class Ours(Contender):
    """This system, with the optimizer of its training loop. It does not choose its attention, see `with_attention`."""

    module: MIMAE

    def __init__(self, recipe: Recipe, state: State, images: Tensor, device: torch.device) -> None:
        module = MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective)
        module.load_state_dict(state)
        super().__init__(recipe, module.to(device), images.to(device))
        self.sample_ids = torch.arange(len(images), device=device)
        self.epoch = 0
        rule = groups(recipe.optimizer, len(images), recipe.masking.num_masks)
        self.optimizer = Optimizer(whole_parts(module), recipe.optimizer, rule, device)

    def draw(self) -> tuple[Tensor, ...]:
        self.epoch += 1
        recipe = self.recipe
        return views(recipe, recipe.seed, self.epoch, self.sample_ids)

    def update(self) -> None:
        self.optimizer.step(1.0)

    def compile_blocks(self) -> None:
        compile_units(self.module, self.recipe.compile, self.recipe.model.checkpointing, self.images.device)


class Baseline(Contender):
    """Another implementation, with fused AdamW and the faster of its ways to compute attention."""

    module: EagerMIMAE | TransformersMAE | LightlyMAE

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        state: State,
        images: Tensor,
        device: torch.device,
        attention: str | None = None,
    ) -> None:
        """Set up the baseline. `attention` is a key of ATTENTION; None: the faster one, which `warm_up` finds on a CPU.

        On a GPU it is measured by itself, since a compiled block keeps the form with which it was compiled.
        """
        if attention is None and device.type == "cuda":
            dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
            attention, _ = attention_choice.choose(attention_choice.calls(recipe, 1), device, dtype, ("sdpa", "cudnn"))
        self.attention = attention
        module: Any = BASELINES[name](recipe)
        module.load(dict(state))
        mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
        pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        if device.type != "cpu":  # Fake tensors, on which memory is counted, cannot be moved.
            module.to(device)
        super().__init__(recipe, module.train(), pixels.to(device))
        self.compiled = self.compiled or name == "compiled"
        if self.attention is not None:
            module.set_attention(ATTENTION[self.attention])
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter_name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim > 1 and not re.search("token|posterior", parameter_name)
                (decayed if is_matrix else others).append(parameter)
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate * len(images) * recipe.masking.num_masks / 256,
            betas=settings.betas,
            fused=True,
        )

    def forward(self, masks: Sequence[Tensor], precision: str) -> Tensor:
        if self.attention != "cudnn":
            return super().forward(masks, precision)
        with sdpa_kernel(list(_CUDNN_FIRST), set_priority=True):
            return super().forward(masks, precision)

    def draw(self) -> tuple[Tensor, ...]:
        return (torch.rand(len(self.images), self.num_patches, device=self.images.device),)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self) -> float:
        if self.attention is not None:
            return super().warm_up()
        if self.compiled:
            self.compile_blocks()
        seconds = dict.fromkeys(ON_CPU, float("inf"))
        for _ in range(TRIALS):
            for name in ON_CPU:
                self.module.set_attention(ATTENTION[name])
                seconds[name] = min(seconds[name], self.timed(1))
        self.attention = min(seconds, key=seconds.__getitem__)
        self.module.set_attention(ATTENTION[self.attention])
        return seconds[self.attention]

    def compile_blocks(self) -> None:
        for block in (*self.module.blocks, *self.module.decoder_blocks):
            # Compile as this system does: torch would treat the decoder's sizes as changed sizes of the encoder.
            block.compile(dynamic=False)


def with_attention(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with the attention that a run on `device` would choose for model.attention=auto."""
    if recipe.model.attention != "auto":
        return recipe
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    name, _ = attention_choice.choose(attention_choice.calls(recipe, 1), device, dtype)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": name})})


def batch_of(recipe: Recipe) -> Tensor:
    """Return uint8 noise images (B, H, W, 3): the time of a step does not depend on their content."""
    size = (recipe.schedule.batch_size, *recipe.data.size_hw, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def check_baselines(recipe: Recipe) -> None:
    """Raise UserError for a method that the other implementations lack."""
    masking, decoder = recipe.masking, recipe.decoder
    if masking.kind != "orthogonal" and masking.num_masks > 1:
        raise UserError(f"the eager baseline only has orthogonal masks, and masking.kind is {masking.kind}")
    if (decoder.predict, decoder.attention) != ("hidden", "self"):
        raise UserError(
            "the baselines predict the hidden patches with self attention: decoder.predict and decoder.attention are "
            f"{decoder.predict} and {decoder.attention}; --variant compares this system with itself"
        )
