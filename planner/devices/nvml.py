"""CUDA devices as the NVIDIA management library reports them; none where there is no driver."""

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One GPU. The index is the one torch uses, i.e. within CUDA_VISIBLE_DEVICES."""

    index: int
    product: str
    memory_bytes: int
    free_bytes: int
    bandwidth_bytes_per_second: float
    """From bus width and memory clock; 0 where NVML does not tell."""


def cuda_devices() -> tuple[CudaDevice, ...]:
    """Return the CUDA devices this process may use, without creating a CUDA context."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: all mean that there is nothing to plan with
        return ()
    try:
        handles = _visible([pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())], pynvml)
        return tuple(_describe(index, handle, pynvml) for index, handle in enumerate(handles))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _visible(handles: list[Any], pynvml: Any) -> list[Any]:
    """Apply CUDA_VISIBLE_DEVICES (indices or GPU-... identifiers); CUDA stops at the first one it does not know."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    by_number = {str(index): handle for index, handle in enumerate(handles)}
    identifiers = {_text(pynvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
    visible = []
    for name in (part.strip() for part in wanted.split(",")):
        starts = [handle for uuid, handle in identifiers.items() if name.startswith("GPU-") and uuid.startswith(name)]
        if name in by_number:
            visible.append(by_number[name])
        elif len(starts) == 1:
            visible.append(starts[0])
        else:
            break
    return visible


def _describe(index: int, handle: Any, pynvml: Any) -> CudaDevice:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return CudaDevice(
        index,
        _text(pynvml.nvmlDeviceGetName(handle)),
        int(memory.total),
        int(memory.free),
        _bandwidth(handle, pynvml),
    )


def _bandwidth(handle: Any, pynvml: Any) -> float:
    try:
        bits = pynvml.nvmlDeviceGetMemoryBusWidth(handle)
        megahertz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
    except pynvml.NVMLError:
        return 0.0
    return float(bits / 8 * megahertz * 1e6 * 2)  # two transfers per clock


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
