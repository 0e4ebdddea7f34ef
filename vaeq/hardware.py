"""What a run computes on: the device and the precision that its settings come to here."""

from __future__ import annotations

from pathlib import Path

import torch

from vaeq.errors import InputError
from vaeq.memory import available_memory


def resolve_device(name: str) -> torch.device:
    """The torch device of a config's ``device``.

    Raises:
        InputError: a GPU was asked for by name and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={name} is not available: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; use device=cpu or device=auto."
        )
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision of a config's ``precision`` on a device.

    ``auto`` is bf16 where the processor multiplies it in hardware, which takes a third off a step
    and moves no result beyond the spread of seeds; else fp32.

    Raises:
        InputError: tf32 was asked for on a CPU.
    """
    if name == "tf32" and device.type != "cuda":
        raise InputError("precision=tf32 needs a GPU; use precision=auto, fp32 or bf16.")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if cpu_flags() & {"avx512_bf16", "amx_bf16"} else "fp32"


def cpu_flags() -> set[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    named = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return set(named[0].split()) if named else set()


def free_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that can still be taken on a device, and what it is called."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    return available_memory(), "this machine"
