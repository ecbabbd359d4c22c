"""Settings of the objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mimae.config.section import Section


class ObjectiveSettings(Section):
    """Weights and choices of the objective. A term of weight 0 is not computed."""

    max_mi: float = Field(0.03, ge=0, description="weight of L_max (InfoNCE between views)")
    min_mi: float = Field(0.01, ge=0, description="weight of L_min (CLUB between latent and image, per dimension)")
    temperature: float = Field(0.07, ge=0.01, le=10, description="InfoNCE temperature; initial value of a learned one")
    learn_temperature: bool = Field(False, description="learn the temperature (bounded below by 0.01)")
    latent: Literal["mean", "class_token"] = Field(
        "mean", description="latent of a view: mean of its patch tokens, or the class token"
    )
    projector: Literal["none", "mlp"] = Field(
        "none", description="network (D, 2D, D) between the latent and L_max, or none"
    )
    posterior_width: int = Field(256, ge=1, description="hidden width of V")
    gate_loss: float | None = Field(
        None, gt=0, description="L_rec below which the MI terms switch on for good; null: on from step 0"
    )
    normalize_pixels: bool = Field(True, description="normalise targets by each patch's mean and variance")
