"""Marks for the parts of a step: spans that torch.profiler records.

A training run does not have these marks. They are added to a model only for a profile, and removed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.profiler import record_function

from mimae.model.units import Model

PREFIX = "mimae: "

STEP, FORWARD, BACKWARD = "step", "forward", "backward"


Mark = Callable[[str], AbstractContextManager[Any]]
"""Function that returns a context, which names the operators inside."""


def mark(name: str) -> AbstractContextManager[Any]:
    """Return a context that torch.profiler records as a span."""
    return record_function(PREFIX + name)


@contextmanager
def marked(model: Model, mark: Mark = mark) -> Iterator[None]:
    """Mark each call of a part of the model with its name: blocks, modules next to them, terms of the objective."""
    with ExitStack() as undo:
        for name, module in parts(model):
            _around(module, name, mark, undo)
        objective = getattr(model, "objective", None)
        if objective is not None:
            _replace(objective, "start", "latents", mark, undo)
            for loss in objective.losses:
                _replace(loss, "compute", f"objective.{loss.term.name}", mark, undo)
        yield


def parts(model: Model) -> list[tuple[str, nn.Module]]:
    """Return the modules that are marked: units (blocks), modules that contain units, and the largest other modules."""
    units = set(map(id, model.units()))
    holders = {
        name for name, module in model.named_modules() if any(id(below) in units for below in module.modules())
    } - {name for name, module in model.named_modules() if id(module) in units}
    found = []

    def walk(module: nn.Module, prefix: str) -> None:
        for key, child in module.named_children():
            name = f"{prefix}{key}"
            is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # A container is never called.
            if not is_container:
                found.append((name, child))
            if is_container or name in holders:
                walk(child, f"{name}.")

    walk(model, "")
    return found


def _around(module: nn.Module, name: str, mark: Mark, undo: ExitStack) -> None:
    """Put a span around the calls of a module. If it is compiled, the span is around the unchanged compiled code."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:

        def call(*inputs: Any, **named: Any) -> Any:
            with mark(name):
                return compiled(*inputs, **named)

        module._compiled_call_impl = call  # type: ignore[assignment]
        undo.callback(setattr, module, "_compiled_call_impl", compiled)
        return
    open_spans: list[AbstractContextManager[Any]] = []

    def begin(*_: Any) -> None:
        open_spans.append(mark(name))
        open_spans[-1].__enter__()

    def end(*_: Any) -> None:
        open_spans.pop().__exit__(None, None, None)

    undo.enter_context(_removed(module.register_forward_pre_hook(begin)))
    undo.enter_context(_removed(module.register_forward_hook(end)))


@contextmanager
def _removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()


def _replace(owner: Any, method: str, name: str, mark: Mark, undo: ExitStack) -> None:
    """Put a span around the calls of a method of one object."""
    plain: Callable[..., Any] = getattr(owner, method)

    def call(*inputs: Any, **named: Any) -> Any:
        with mark(name):
            return plain(*inputs, **named)

    object.__setattr__(owner, method, call)
    undo.callback(object.__delattr__, owner, method)
