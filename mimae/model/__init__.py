"""The networks: encoder, decoder, and MI-MAE that joins them to the objective."""

from mimae.model.encoder import Encoder, ModelSettings
from mimae.model.mimae import MIMAE, build, outline

__all__ = ["MIMAE", "Encoder", "ModelSettings", "build", "outline"]
