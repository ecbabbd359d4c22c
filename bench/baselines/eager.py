"""MI-MAE in plain PyTorch on MAE's structure, as in a research prototype: the baseline of a step.

Images are float and repeated once per view, a convolution embeds all their patches before the visible ones
are gathered, the order comes from two argsorts of noise, mask tokens are put back into image order, targets
are materialised for every view, InfoNCE has full logits for every ordered pair of views, and CLUB compares
every latent with every image. In one process it computes the same loss as `mimae.MIMAE` from the same weights.

Letters in shapes: B images, N views, L patches, K visible, D width, Dd decoder width, P patch size.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimae.config.recipe import Recipe
from mimae.model.geometry import geometry

_STATE = {
    "patch_embed.": "encoder.patch_embed.proj.",
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "blocks.": "encoder.blocks.",
    "norm.": "encoder.norm.",
    "decoder_embed.": "decoder.embed.",
    "mask_token": "decoder.mask_token",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.head.",
    "posterior.0.": "objective.posterior.hidden.",
    "posterior.2.": "objective.posterior.output.",
    "projector.": "objective.projector.",
    "log_temperature": "objective.log_temperature",
}


def sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Return fixed positions (1, 1 + L, width): zeros for the class token; first half columns, second half rows."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (columns, rows)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float()[None]


def transformer(depth: int, width: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList(
        Block(width, heads, mlp_ratio=4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))  # type: ignore[arg-type]
        for _ in range(depth)
    )


class EagerMIMAE(nn.Module):
    """The model of a recipe with orthogonal masks; `forward` returns the loss with the gate open."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        model, decoder, self.objective = recipe.model, recipe.decoder, recipe.objective
        self.patch_size = model.patch_size
        sizes = geometry(recipe)
        grid = (sizes.grid.rows, sizes.grid.columns)
        num_patches = sizes.grid.patches
        self.num_masks, self.num_visible = sizes.views, sizes.visible

        self.patch_embed = nn.Conv2d(3, model.width, self.patch_size, stride=self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, model.width))
        self.pos_embed = nn.Parameter(sincos(grid, model.width), requires_grad=False)
        self.blocks = transformer(model.depth, model.width, model.heads)
        self.norm = nn.LayerNorm(model.width, eps=1e-6)

        self.decoder_embed = nn.Linear(model.width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(sincos(grid, decoder.width), requires_grad=False)
        self.decoder_blocks = transformer(decoder.depth, decoder.width, decoder.heads)
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.width, sizes.grid.values)

        self.posterior = self.projector = self.log_temperature = None
        if self.objective.min_mi > 0:
            hidden = self.objective.posterior_width
            self.posterior = nn.Sequential(
                nn.Linear(3 * num_patches, hidden), nn.GELU(), nn.Linear(hidden, 2 * model.width)
            )
        if self.objective.max_mi > 0 and self.objective.projector == "mlp":
            self.projector = nn.Sequential(
                nn.Linear(model.width, 2 * model.width), nn.GELU(), nn.Linear(2 * model.width, model.width)
            )
        if self.objective.max_mi > 0 and self.objective.learn_temperature:
            self.log_temperature = nn.Parameter(torch.zeros(1))

    def set_attention(self, fused: bool) -> None:
        """Choose torch's fused attention, or two products and a softmax."""
        for block in (*self.blocks, *self.decoder_blocks):
            block.attn.fused_attn = fused  # type: ignore[union-attr, assignment]

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the weights of a `MIMAE.state_dict()`."""
        own = {}
        for name, value in self.state_dict().items():
            prefix = next((prefix for prefix in _STATE if name.startswith(prefix)), None)
            own[name] = value if prefix is None else state[_STATE[prefix] + name[len(prefix) :]]
        self.load_state_dict(own)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of images float (B, 3, H, W), normalised by channel. Noise (B, L) gives the masks."""
        permutation = torch.argsort(noise, dim=1)
        ids_shuffle = torch.cat(
            [torch.roll(permutation, -view * self.num_visible, dims=1) for view in range(self.num_masks)]
        )  # (N B, L), the visible ones first
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        images_NB = images.repeat(self.num_masks, 1, 1, 1)

        latent = self.forward_encoder(images_NB, ids_shuffle[:, : self.num_visible])
        pred = self.forward_decoder(latent, ids_restore)
        with torch.autocast(images.device.type, enabled=False):
            loss = self.reconstruction(images_NB, pred, ids_restore)
            latent = latent[:, :1] if self.objective.latent == "class_token" else latent[:, 1:]
            z_NBD = latent.to(loss.dtype).mean(dim=1).unflatten(0, (self.num_masks, -1))
            if self.objective.max_mi > 0:
                loss = loss + self.objective.max_mi * self.infonce(z_NBD)
            if self.posterior is not None:
                club, nll = self.club(images, z_NBD)
                loss = loss + self.objective.min_mi * club / z_NBD.shape[-1] + nll
        return loss

    def forward_encoder(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = x + self.pos_embed[:, 1:]
        x = torch.gather(x, 1, ids_keep[:, :, None].expand(-1, -1, x.shape[-1]))
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        num_hidden = ids_restore.shape[1] - self.num_visible
        mask_tokens = self.mask_token.to(x.dtype).repeat(x.shape[0], num_hidden, 1)
        shuffled = torch.cat([x[:, 1:], mask_tokens], dim=1)
        restored = torch.gather(shuffled, 1, ids_restore[:, :, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], restored], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def patchify(self, images: Tensor) -> Tensor:
        """Cut images (B, 3, H, W) into patches (B, L, 3P^2), with values ordered (row, column, channel)."""
        P = self.patch_size
        B, C, H, W = images.shape
        x = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(B, (H // P) * (W // P), P * P * C)

    def reconstruction(self, images: Tensor, pred: Tensor, ids_restore: Tensor) -> Tensor:
        target = self.patchify(images)
        if self.objective.normalize_pixels:
            mean = target.mean(dim=-1, keepdim=True)
            var = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((pred.to(target.dtype) - target) ** 2).mean(dim=-1)
        mask = (ids_restore >= self.num_visible).to(loss.dtype)
        return (loss * mask).sum() / mask.sum()

    def infonce(self, z_NBD: Tensor) -> Tensor:
        u = z_NBD if self.projector is None else self.projector(z_NBD)
        u = F.normalize(u, dim=-1)
        temperature: Tensor | float = self.objective.temperature
        if self.log_temperature is not None:
            temperature = self.log_temperature.exp().clamp_min(0.01)
        labels = torch.arange(u.shape[1], device=u.device)
        losses = [
            F.cross_entropy(u[a] @ u[b].T / temperature, labels)
            for a in range(self.num_masks)
            for b in range(self.num_masks)
            if a != b
        ]
        return torch.stack(losses).mean()

    def club(self, images: Tensor, z_NBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return CLUB in nats, which trains the encoder, and the posterior's likelihood, which trains the posterior."""
        assert self.posterior is not None
        colours = F.avg_pool2d(images, self.patch_size).permute(0, 2, 3, 1).flatten(1)
        mu, log_var = self.posterior(colours).chunk(2, dim=-1)
        log_var = 3 * torch.tanh(log_var / 3)
        z = z_NBD.flatten(0, 1)
        var, mean = torch.var_mean(z.detach(), dim=0, correction=0)
        y = (z - mean) / (var + 1e-6).sqrt()

        def log_density(y: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
            return -0.5 * (log_var + (y - mu) ** 2 / log_var.exp())

        views = self.num_masks
        fixed_mu, fixed_log_var = mu.detach(), log_var.detach()
        positive = log_density(y, fixed_mu.repeat(views, 1), fixed_log_var.repeat(views, 1)).sum(-1).mean()
        pairs = log_density(y[None], fixed_mu[:, None], fixed_log_var[:, None])  # (B, N B, D)
        club = positive - pairs.sum(-1).mean()
        nll = -log_density(y.detach(), mu.repeat(views, 1), log_var.repeat(views, 1)).mean()
        return club, nll
