"""Triton's CPU interpreter, made able to run fla's kernels: three gaps closed, and memory nobody wrote made visible.

For a process of its own, started with TRITON_INTERPRET=1: `@triton.jit` reads it where a kernel is defined, so what was
imported to be compiled stays so. No installed file is changed. Races, shared-memory limits, tf32 and tensor-core
layouts are not modelled: a kernel's algorithm and our way of calling it are tested, not its run on a GPU.
"""

import builtins
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def prepare() -> None:
    """Apply every patch; to be called once, before the first kernel runs.

    Raises:
        RuntimeError: the process was not started with TRITON_INTERPRET=1.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("start the process with TRITON_INTERPRET=1: a kernel is interpreted from its definition on")
    # Triton benchmarks interpreted kernels too, and its benchmarker asks for a driver, which a CPU machine lacks. With
    # equal timings the first configuration left after pruning wins.
    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    _make_counters_castable()
    _compute_bf16_by_value()
    _poison_allocations()


class _Counter(int):
    def to(self, dtype: tl.dtype) -> tl.tensor:
        semantic = interpreter.interpreter_semantic
        return semantic.cast(semantic.to_tensor(int(self)), dtype)


def _count(*bounds: Any) -> Iterator[_Counter]:
    # A bound may be a scalar of the kernel, which Triton 3.6 cannot turn into an index with numpy 2.4.
    values = (bound.handle.data.item() if isinstance(bound, tl.tensor) else bound for bound in bounds)
    return map(_Counter, builtins.range(*values))


def _make_counters_castable() -> None:
    """`range` counts in values that have `.to`, in every module with a kernel that runs.

    The compiler makes a loop counter a tensor and fla widens it, `i.to(tl.int64)`; the interpreter leaves Python's int.
    """
    rewrite = InterpretedFunction.rewrite

    def with_counters(self: InterpretedFunction) -> Callable[..., Any]:
        self.fn.__globals__["range"] = _count
        return rewrite(self)

    InterpretedFunction.rewrite = with_counters


def _compute_bf16_by_value() -> None:
    """bf16 operands are widened to fp32, and bf16 results rounded to nearest even.

    The interpreter keeps bf16 as uint16 and computes with the bit patterns (`tl.dot` gives 1e10); its casts from fp32
    truncate. Upstream, on triton issue 11584 and pull request 11585: "we just don't support it yet" (2026-09-05).
    Loads, stores, shapes and bit casts move bits and are right as they are.
    """
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
        setattr(InterpreterBuilder, name, _by_value(getattr(InterpreterBuilder, name)))
    dot, cast, convert = (getattr(InterpreterBuilder, n) for n in ("create_dot", "cast_impl", "create_fp_to_fp"))

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *rest)  # accumulates in d's type, fp32

    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        return narrowed(widened(src)) if dst_type.scalar == tl.bfloat16 else cast(self, widened(src), dst_type)

    def create_fp_to_fp(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding: Any) -> TensorHandle:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return self.cast_impl(src, dst_type)
        return convert(self, src, dst_type, rounding)

    InterpreterBuilder.get_bf16 = lambda self, value: narrowed(self.get_fp32(value))  # constants; absent in Triton 3.7
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    for operation in (ReduceOps, ScanOps):
        operation.apply_impl = _tensors_by_value(operation.apply_impl)


def widened(x: Any) -> Any:
    """A bf16 handle as fp32; anything else as it is."""
    return TensorHandle((np.asarray(x.data).astype(np.uint32) << 16).view(np.float32), tl.float32) if _is_bf16(x) else x


def narrowed(x: TensorHandle) -> TensorHandle:
    """A handle of any number type as bf16, rounded to nearest even."""
    values = np.asarray(x.data).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return TensorHandle(np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _is_bf16(x: object) -> bool:
    # A comparison's result keeps its operands' type in the interpreter, and is bool.
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _by_value(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def run(self: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        if not any(_is_bf16(x) for x in arguments):
            return method(self, *arguments)
        result = method(self, *(widened(x) for x in arguments))
        return narrowed(result) if result.data.dtype == np.float32 else result

    return run


def _tensors_by_value(method: Callable[..., Any]) -> Callable[..., Any]:
    def with_handle(x: tl.tensor, handle: TensorHandle) -> tl.tensor:
        return tl.tensor(handle, tl.block_type(handle.dtype, x.shape) if x.type.is_block() else handle.dtype)

    def run(self: ReduceOps | ScanOps, tensors: tuple[tl.tensor, ...]) -> Any:
        found = method(self, tuple(with_handle(x, widened(x.handle)) if _is_bf16(x.handle) else x for x in tensors))
        found = found if isinstance(found, list | tuple) else (found,)
        return [
            with_handle(new, narrowed(new.handle)) if _is_bf16(old.handle) and new.dtype == tl.float32 else new
            for old, new in zip(tensors, found)
        ]

    return run


def _poison_allocations() -> None:
    """Fresh floating-point memory holds NaN, so that an output a kernel forgets to write fails its comparison."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **options: Any) -> Tensor:
            fresh = allocate(*arguments, **options)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, poisoned(getattr(owner, name)))
