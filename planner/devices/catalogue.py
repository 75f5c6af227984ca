"""Common accelerators by name, so that hardware one does not own can be planned for.

Numbers are those of the vendors' data sheets: memory, peak memory bandwidth, and peak dense rates per dtype (tensor or
matrix cores with 32-bit accumulation, without structured sparsity). Apple publishes no rates for its GPUs: theirs are
cores x 128 lanes x 2 x clock. Processor entries are by memory channels, with rates typical of such machines.
A rate that is missing is a dtype the hardware does not have.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from plans.cluster import Device, DeviceKind
from plans.dtypes import DtypeName

GIB = 1 << 30
ACHIEVED_BANDWIDTH = 0.8
"""Share of the peak bandwidth that reading weights reaches (STREAM-like reads on GPUs reach 0.8-0.93)."""
ACHIEVED_FLOPS = 0.5
"""Share of the peak rate that the matrix products of a prefill reach."""
FIXED_OVERHEAD_BYTES: Mapping[DeviceKind, int] = {"cuda": 600 << 20, "mps": 300 << 20, "xpu": 600 << 20}
"""Framework context, library workspaces and allocator slack on a device, before any weights."""
UNIT_OVERHEAD_SECONDS: Mapping[DeviceKind, float] = {"cpu": 300e-6, "cuda": 100e-6, "mps": 200e-6, "xpu": 200e-6}
"""Launching the kernels of one decoder layer, from Python: about a dozen, 5-10 microseconds each on a GPU."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One entry of the catalogue; bandwidth in GB/s and rates in TFLOP/s, as data sheets print them."""

    name: str
    title: str
    kind: DeviceKind
    memory_gib: float
    bandwidth_gb: float
    fp32_tflops: float
    fp16_tflops: float | None
    bf16_tflops: float | None

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gib * GIB)

    @property
    def flops_per_second(self) -> dict[DtypeName, float]:
        """Rates that matrix products reach, by dtype."""
        peak: dict[DtypeName, float | None] = {
            "fp32": self.fp32_tflops, "fp16": self.fp16_tflops, "bf16": self.bf16_tflops,
        }  # fmt: skip
        return {dtype: rate * 1e12 * ACHIEVED_FLOPS for dtype, rate in peak.items() if rate is not None}

    def device(self, name: str, *, host: str = "local", budget_bytes: int | None = None) -> Device:
        """Return a device of this kind; memory grows to the budget if that is larger."""
        return Device(
            name=name,
            host=host,
            kind=self.kind,
            memory_bytes=max(self.memory_bytes, budget_bytes or 0),
            budget_bytes=budget_bytes,
            fixed_overhead_bytes=FIXED_OVERHEAD_BYTES.get(self.kind, 0),
            memory_bandwidth_bytes_per_second=self.bandwidth_gb * 1e9 * ACHIEVED_BANDWIDTH,
            flops_per_second=self.flops_per_second,
            unit_overhead_seconds=UNIT_OVERHEAD_SECONDS.get(self.kind, 200e-6),
        )


CATALOGUE: tuple[Accelerator, ...] = (
    Accelerator("rtx3060", "GeForce RTX 3060 12 GB", "cuda", 12, 360, 12.7, 25.5, 25.5),
    Accelerator("rtx3090", "GeForce RTX 3090", "cuda", 24, 936, 35.6, 71, 71),
    Accelerator("rtx4060ti", "GeForce RTX 4060 Ti 16 GB", "cuda", 16, 288, 22.1, 44.1, 44.1),
    Accelerator("rtx4070", "GeForce RTX 4070", "cuda", 12, 504, 29.1, 58.3, 58.3),
    Accelerator("rtx4080", "GeForce RTX 4080", "cuda", 16, 716.8, 48.7, 97.5, 97.5),
    Accelerator("rtx4090", "GeForce RTX 4090", "cuda", 24, 1008, 82.6, 165.2, 165.2),
    Accelerator("rtx5090", "GeForce RTX 5090", "cuda", 32, 1792, 104.8, 209.5, 209.5),
    Accelerator("t4", "NVIDIA T4", "cuda", 16, 320, 8.1, 65, None),
    Accelerator("v100-16g", "NVIDIA V100 SXM2 16 GB", "cuda", 16, 900, 15.7, 125, None),
    Accelerator("v100-32g", "NVIDIA V100 SXM2 32 GB", "cuda", 32, 900, 15.7, 125, None),
    Accelerator("a10", "NVIDIA A10", "cuda", 24, 600, 31.2, 125, 125),
    Accelerator("a40", "NVIDIA A40", "cuda", 48, 696, 37.4, 149.7, 149.7),
    Accelerator("a100-40g", "NVIDIA A100 40 GB", "cuda", 40, 1555, 19.5, 312, 312),
    Accelerator("a100-80g", "NVIDIA A100 80 GB SXM", "cuda", 80, 2039, 19.5, 312, 312),
    Accelerator("l4", "NVIDIA L4", "cuda", 24, 300, 30.3, 121, 121),
    Accelerator("l40s", "NVIDIA L40S", "cuda", 48, 864, 91.6, 362, 362),
    Accelerator("h100-pcie", "NVIDIA H100 PCIe", "cuda", 80, 2000, 51, 756, 756),
    Accelerator("h100", "NVIDIA H100 SXM", "cuda", 80, 3350, 67, 989, 989),
    Accelerator("h200", "NVIDIA H200", "cuda", 140.4, 4800, 67, 989, 989),
    Accelerator("b200", "NVIDIA B200", "cuda", 180, 7700, 75, 2250, 2250),
    Accelerator("mi250x", "AMD Instinct MI250X", "cuda", 128, 3277, 47.9, 383, 383),
    Accelerator("mi300x", "AMD Instinct MI300X", "cuda", 192, 5300, 163.4, 1307, 1307),
    Accelerator("jetson-orin-nano", "Jetson Orin Nano 8 GB", "cuda", 8, 68, 1.3, 10, 10),
    Accelerator("jetson-orin", "Jetson AGX Orin 64 GB", "cuda", 64, 204.8, 5.3, 42.5, 42.5),
    Accelerator("m1", "Apple M1", "mps", 16, 68.3, 2.6, 2.6, 2.6),
    Accelerator("m1-max", "Apple M1 Max", "mps", 64, 400, 10.6, 10.6, 10.6),
    Accelerator("m2", "Apple M2", "mps", 24, 100, 3.6, 3.6, 3.6),
    Accelerator("m2-ultra", "Apple M2 Ultra", "mps", 192, 800, 27.2, 27.2, 27.2),
    Accelerator("m3-max", "Apple M3 Max", "mps", 128, 400, 14.2, 14.2, 14.2),
    Accelerator("m4", "Apple M4", "mps", 32, 120, 3.8, 3.8, 3.8),
    Accelerator("m4-max", "Apple M4 Max", "mps", 128, 546, 16.2, 16.2, 16.2),
    Accelerator("ddr4-2ch", "desktop, 2 x DDR4-3200", "cpu", 32, 51.2, 0.5, 0.1, 0.5),
    Accelerator("ddr5-2ch", "desktop, 2 x DDR5-5600", "cpu", 64, 89.6, 1.0, 0.2, 1.0),
    Accelerator("ddr4-8ch", "server, 8 x DDR4-3200", "cpu", 256, 204.8, 2.5, 0.5, 2.5),
    Accelerator("ddr5-8ch", "server, 8 x DDR5-4800", "cpu", 512, 307.2, 4.0, 8.0, 16.0),
    Accelerator("ddr5-12ch", "server, 12 x DDR5-4800", "cpu", 768, 460.8, 5.0, 1.0, 10.0),
)

_BY_NAME = {entry.name: entry for entry in CATALOGUE}


def find_accelerator(name: str) -> Accelerator | None:
    """Return the entry called `name`, whatever its case, or None."""
    return _BY_NAME.get(name.casefold())


def recognise(product: str, *, memory_bytes: int) -> Accelerator | None:
    """Return the entry that fits a product name as a driver reports it (``NVIDIA A100-SXM4-80GB``), or None.

    Of entries that share a chip (``a100-40g``, ``a100-80g``) the one nearest in memory is taken.
    """
    words = product.casefold().replace("-", " ").split()
    joined = "".join(words)
    fitting = [e for e in CATALOGUE if e.kind == "cuda" and _chip(e) and (_chip(e) in words or _chip(e) in joined)]
    if not fitting:
        return None
    longest = max(len(_chip(entry)) for entry in fitting)
    alike = [entry for entry in fitting if len(_chip(entry)) == longest]
    return min(alike, key=lambda entry: (_form_rank(entry, words), abs(entry.memory_bytes - memory_bytes)))


def _chip(entry: Accelerator) -> str:
    return entry.name.split("-")[0]


def _form_rank(entry: Accelerator, words: list[str]) -> int:
    """A form factor that the product names (``pcie``) is best, one that it does not name is worst."""
    form = entry.name.partition("-")[2]
    return 1 if not form.isalpha() else 0 if form in words else 2
