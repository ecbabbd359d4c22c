"""Imports of every rank, about 6 CPU seconds. The server that forks the ranks of the tests imports them once."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from importlib import import_module

import mimae.train.tasks.pretrain  # noqa: F401

with suppress(ImportError):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # imports torch's compiler too

gc.freeze()  # The garbage collector of a rank then ignores the server's objects, and does not copy their pages.
