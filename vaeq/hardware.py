"""What a run computes on: the device and the precision that its settings come to here."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from vaeq.errors import InputError


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

    ``auto`` is bf16 where the processor multiplies it in hardware, which halves the time of a step
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
    return "bf16" if _cpu_flags() & {"avx512_bf16", "amx_bf16"} else "fp32"


def _cpu_flags() -> set[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return set(flags[0]) if flags else set()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: what the machine has free, and its control groups allow.

    Where neither says anything it is 2^63.
    """
    free = [2**63]
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError, IndexError):
        return min(free)
    for group in groups:
        number, controllers, path = group.split(":", 2)
        if number == "0":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in {base / own, *(base / parent for parent in own.parents), base}:
            with contextlib.suppress(OSError, ValueError):  # no limit here, or it is "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                free.append(max(0, limit - used))
    return min(free)
