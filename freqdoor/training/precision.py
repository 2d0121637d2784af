"""Which precision a processor computes in natively: bfloat16 that is emulated is slower than float32, and no better."""

import os
from typing import Literal

import numpy as np
import torch

Precision = Literal["auto", "fp32", "bf16"]
WITHOUT_BF16 = {"AVX512_CORE", "AVX512_CORE_VNNI"}  # instruction sets, as oneDNN calls them


def dtype_of(precision: Precision, device: str) -> torch.dtype:
    """The dtype that a setting stands for on a PyTorch device: of "auto" bfloat16 where it is native, else float32."""
    if precision == "auto":
        return torch.bfloat16 if _native_bf16(torch.device(device)) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def precision_name(dtype: torch.dtype) -> Literal["fp32", "bf16"]:
    """How settings call a dtype."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    # what the processor has, and what ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA leave of it
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and torch.backends.cpu.get_cpu_capability() == "AVX512" and _onednn_bf16()


def _onednn_bf16() -> bool:
    """Whether oneDNN, which computes the convolutions, may use bfloat16; its own query knows only of AVX2's limit."""
    limits = {os.environ.get(f"{library}_MAX_CPU_ISA", "").upper() for library in ("ONEDNN", "DNNL")}
    return not limits & WITHOUT_BF16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def flush_denormals() -> None:
    """Take denormal numbers for zero on this thread: they slow late training down."""
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # asked for later, without denormal numbers, it warns that there are none
    torch.set_flush_denormal(True)
