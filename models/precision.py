"""Which precision the hardware multiplies fast in."""

import torch

PRECISIONS = ("auto", "fp32", "bf16")


def pick_precision(name: str, device: torch.device) -> str:
    """'fp32' or 'bf16'; 'auto' is bf16 where the hardware multiplies in it, else fp32.

    That is: NVIDIA GPUs from Ampere on, and CPUs with AVX512-BF16 or AMX. Elsewhere bfloat16 is slower than float32, or, as
    on Apple's GPUs, untried.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        # The public list of CPU capabilities has no entry for it.
        known = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return "bf16" if any(ask and ask() for ask in known) else "fp32"
    return "fp32"
