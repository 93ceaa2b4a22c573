"""Tile sizes of the gated delta rule's kernels by head sizes and dtype: a committed table instead of autotuning.

The figures behind the choice, what each kernel takes of an sm_90 by Triton's own account, are in README.md.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """How the kernels cut their work.

    Attributes:
        chunk_bk: columns of K that a step of the chunk kernel reads.
        k0, k1: rows of K that a scan holds in two tiles, each a power of two; k1 is 0 where K is one itself.
        bv: columns of V that a scan's program holds.
        warps, stages: of a scan; stages is how many chunks of loads are under way.
        gradient_k0, gradient_k1: columns of K in the two tiles of the kernel of dq, dk, dv.
        gradient_bv: columns of V that a step of it reads.
        gradient_warps, gradient_stages: of that kernel.
        precision: Triton's input_precision, for products of fp32 numbers: "tf32" where results are rounded to 16 bits,
            else three tf32 products, which keep 21 bits and, unlike "ieee", run on tensor cores.
    """

    chunk_bk: int
    k0: int
    k1: int
    bv: int
    warps: int
    stages: int
    gradient_k0: int
    gradient_k1: int
    gradient_bv: int
    gradient_warps: int
    gradient_stages: int
    precision: str


def tiles(d_k: int, d_v: int, dtype: torch.dtype) -> Tiles:
    """Tiles for q, k [.., d_k] and v [.., d_v], both multiples of 32 up to 256."""
    k0 = 1 << (d_k.bit_length() - 1)
    k1 = 1 << (d_k - k0 - 1).bit_length() if d_k > k0 else 0
    is_half = dtype != torch.float32
    is_halved = k1 == 0 and k0 >= 128  # two tiles of half the columns leave fewer registers in use at once
    return Tiles(
        chunk_bk=32,
        k0=k0,
        k1=k1,
        bv=64 if d_v % 64 == 0 and d_k <= 128 and is_half else 32,
        warps=4,
        stages=(3 if d_k <= 128 else 2) if is_half else 1,
        gradient_k0=k0 // 2 if is_halved else k0,
        gradient_k1=k0 // 2 if is_halved else k1,
        gradient_bv=32,
        gradient_warps=8,
        gradient_stages=2 if is_half else 1,
        precision="tf32" if is_half else "tf32x3",
    )
