"""What the hardware computes in."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there: on GPUs, and on CPUs with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


@functools.cache
def multiplies_int8(device: torch.device) -> bool:
    """Whether a product of int8 matrices there is fast and exact: on CPUs with instructions that sum it in 32 bits.

    Others may sum pairs of products in 16 bits, which saturate, so the extremes are tried before it is relied on.
    """
    if device.type != "cpu" or not _cpu_flags() & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return False
    signs = torch.tensor([[1], [-1]], dtype=torch.int8).repeat(16, 1)
    rows = (127 * signs).expand(-1, 1040).contiguous()  # as deep as a layer of the integer network can be
    try:
        product = torch._int_mm(rows, rows.T.contiguous())
    except (AttributeError, RuntimeError):
        return False
    return bool((product == 127 * 127 * 1040 * (signs.int() * signs.int().T)).all())


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())
