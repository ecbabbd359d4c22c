"""Imports of every rank, some 6 CPU seconds: the server that forks the ranks of the tests has them once."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from importlib import import_module

import mimae.train.tasks.pretrain  # noqa: F401

with suppress(ImportError):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # imports torch's compiler too

gc.freeze()  # A collection in a rank passes over what the server has made, and copies none of its pages.
