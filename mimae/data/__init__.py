"""Images in, micro-batches out: sources, the order of an epoch, crops, decoding and loaders."""

from mimae.data.backend import fastest
from mimae.data.batch import BadSample, BadSamples, Batch, DataError
from mimae.data.loader import Loader, evaluation_batches, make_loader
from mimae.data.settings import DataSettings
from mimae.data.sources import Source, open_source

__all__ = [
    "BadSample",
    "BadSamples",
    "Batch",
    "DataError",
    "DataSettings",
    "Loader",
    "Source",
    "evaluation_batches",
    "fastest",
    "make_loader",
    "open_source",
]
