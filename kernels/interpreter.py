"""Corrections of Triton's interpreter for bfloat16.

The interpreter keeps bf16 as raw 16-bit integers, multiplies these integers in `tl.dot`, and truncates where a GPU
rounds to nearest even. This module is imported only under TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import torch


def mend_bfloat16() -> None:
    """Patch the interpreter's builder with the GPU's bf16 casts, and with `tl.dot` for bf16 operands."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def decoded(data: Any) -> Any:
        """Convert bf16 bits (uint16) to float32, exactly."""
        numpy = interpreter.np
        return (data.astype(numpy.uint32) << 16).view(numpy.float32)

    def encoded(data: Any) -> Any:
        """Convert float32 to bf16 bits (uint16), rounded to nearest even by torch."""
        numpy = interpreter.np
        contiguous = numpy.array(data, numpy.float32)  # Copy, because torch warns about read-only arrays.
        return torch.from_numpy(contiguous).to(torch.bfloat16).view(torch.uint16).numpy()

    def mended(original: Any) -> Any:
        def cast(self: Any, source: Any, target: Any, *rest: Any) -> Any:
            kinds = (source.dtype.scalar, target.scalar)
            if kinds[0] == tl.bfloat16 and kinds[1] != tl.bfloat16:
                source = handle(decoded(source.data), tl.float32)
                return source if kinds[1] == tl.float32 else original(self, source, target, *rest)
            if kinds[1] == tl.bfloat16 and kinds[0] != tl.bfloat16:
                return handle(encoded(source.data), tl.bfloat16)
            return original(self, source, target, *rest)

        return cast

    builder.cast_impl = mended(builder.cast_impl)
    builder.create_fp_to_fp = mended(builder.create_fp_to_fp)
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (handle(decoded(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    builder.create_dot = create_dot
