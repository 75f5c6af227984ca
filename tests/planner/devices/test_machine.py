"""This machine, devices typed by a person, margins and budgets, and the catalogue."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.devices import machine, nvml
from planner.devices.budgets import KIND_MARGINS, parse_margins, with_budgets
from planner.devices.catalogue import CATALOGUE, find_accelerator, recognise
from planner.devices.clusters import load_cluster
from planner.devices.machine import cluster_from_options, inspect_machine, this_machine
from planner.devices.nvml import CudaDevice, cuda_devices
from plans.cluster import Cluster, Host
from plans.errors import InputError, UsageError
from tests.planner.cases import cluster, device

GIB = 1 << 30


@pytest.fixture
def workstation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GiB with 48 free, eight cores and an RTX 4090 of which 22 GiB are free."""
    gpus = (CudaDevice(0, "NVIDIA GeForce RTX 4090", 24 * GIB, 22 * GIB, 1e12),)
    monkeypatch.setattr(machine, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(machine, "memory_bytes", lambda: (64 * GIB, 48 * GIB))
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)


# --- this machine -------------------------------------------------------------------------------------------------


def test_this_machine_has_a_processor_with_a_budget_below_its_memory() -> None:
    found = this_machine()
    cpu = found.device("cpu")
    assert cpu.budget_bytes is not None
    assert 0 < cpu.budget_bytes < cpu.memory_bytes
    assert found.hosts[0].process_overhead_bytes > 0
    assert Cluster.from_json(found.to_json().encode(), where="cluster.json") == found


@pytest.mark.usefixtures("workstation")
def test_budgets_are_what_is_free_minus_the_margin_of_the_kind() -> None:
    found = this_machine()
    gpu, cpu = found.device("cuda:0"), found.device("cpu")
    assert gpu.budget_bytes == 22 * GIB - math.ceil(24 * GIB * KIND_MARGINS["cuda"])
    assert cpu.budget_bytes == 48 * GIB - math.ceil(64 * GIB * KIND_MARGINS["cpu"])


@pytest.mark.usefixtures("workstation")
def test_a_recognised_gpu_gets_the_rates_of_the_catalogue_and_its_own_memory() -> None:
    gpu = inspect_machine().cluster.device("cuda:0")
    entry = find_accelerator("rtx4090")
    assert entry is not None
    assert gpu.memory_bandwidth_bytes_per_second == entry.device("x").memory_bandwidth_bytes_per_second
    assert gpu.memory_bytes == 24 * GIB
    assert gpu.fixed_overhead_bytes > 0


def test_an_unknown_gpu_gets_the_bandwidth_its_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cuda_devices", lambda: (CudaDevice(0, "Strange 1", GIB, GIB, 7e11),))
    assert inspect_machine().cluster.device("cuda:0").memory_bandwidth_bytes_per_second == 7e11


# --- NVML ---------------------------------------------------------------------------------------------------------


@dataclass
class FakeMemory:
    total: int = 16 * GIB
    free: int = 15 * GIB


class FakeNvml:
    """The few calls of pynvml that are used, for a machine with two GPUs."""

    NVML_CLOCK_MEM = 2

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            if name == self.fails:
                raise self.NVMLError(name)
            return {
                "nvmlDeviceGetCount": 2,
                "nvmlDeviceGetHandleByIndex": arguments[0] if arguments else None,
                "nvmlDeviceGetUUID": f"GPU-{arguments[0] if arguments else 0}aaa",
                "nvmlDeviceGetName": b"Tesla T4",
                "nvmlDeviceGetMemoryInfo": FakeMemory(),
                "nvmlDeviceGetMemoryBusWidth": 256,
                "nvmlDeviceGetMaxClockInfo": 5001,
            }.get(name)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(fails: str = "", visible: str | None = None) -> None:
        monkeypatch.setitem(__import__("sys").modules, "pynvml", FakeNvml(fails))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return install


def test_gpus_are_described_by_the_driver(driver: Any) -> None:
    driver()
    first, second = cuda_devices()
    assert (first.index, second.index) == (0, 1)
    assert first.product == "Tesla T4"
    assert first.free_bytes == 15 * GIB
    assert first.bandwidth_bytes_per_second == pytest.approx(320.064e9)


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetName"])
def test_a_driver_that_fails_means_no_gpus(call: str, driver: Any) -> None:
    driver(fails=call)
    assert cuda_devices() == ()


def test_a_driver_that_keeps_its_clocks_to_itself_is_fine(driver: Any) -> None:
    driver(fails="nvmlDeviceGetMaxClockInfo")
    assert cuda_devices()[0].bandwidth_bytes_per_second == 0


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("1", 1), ("1,0", 2), ("0,7,1", 1), ("GPU-1", 1), ("-1", 0)])
def test_only_visible_gpus_are_listed(visible: str, count: int, driver: Any) -> None:
    driver(visible=visible)
    assert len(cuda_devices()) == count


def test_the_real_library_never_raises() -> None:
    assert isinstance(nvml.cuda_devices(), tuple)


# --- devices typed by a person ------------------------------------------------------------------------------------


def test_a_size_is_the_budget() -> None:
    assert cluster_from_options(["cpu=1GiB"]).devices[0].budget_bytes == GIB
    assert cluster_from_options(["cuda:0=20GiB"]).devices[0].kind == "cuda"
    assert cluster_from_options(["cuda:0=20GiB"]).devices[0].budget_bytes == 20 * GIB


def test_repeated_names_are_numbered_in_their_order() -> None:
    names = [d.name for d in cluster_from_options(["cpu=1GiB", "rtx4090", "cpu=1GiB", "2xl4=20GiB"]).devices]
    assert names == ["cpu#0", "rtx4090", "cpu#1", "l4#0", "l4#1"]


@pytest.mark.usefixtures("workstation")
def test_processors_without_a_size_divide_what_is_free() -> None:
    shared = cluster_from_options(["cpu", "cpu", "cpu=8GiB"])
    open_ones = [shared.device(name).budget_bytes or 0 for name in ("cpu#0", "cpu#1")]
    assert open_ones[0] == open_ones[1]
    assert sum(open_ones) + 8 * GIB <= 48 * GIB
    assert Cluster.from_json(shared.to_json().encode(), where="again") == shared


def test_a_larger_machine_than_this_one_can_be_planned_for() -> None:
    large = cluster_from_options(["cpu=4TiB"])
    assert large.devices[0].budget_bytes == 4 << 40
    assert Cluster.from_json(large.to_json().encode(), where="again") == large


def test_a_device_of_the_catalogue_keeps_a_margin_free() -> None:
    budget = cluster_from_options(["a100-80g"]).devices[0].budget_bytes
    assert budget == 80 * GIB - math.ceil(80 * GIB * KIND_MARGINS["cuda"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("tpu-v9", "not on this machine.*--catalogue"),
        ("cuda:7", "not on this machine and has no size"),
        ("cpu=", "is not NAME"),
        ("=4GiB", "is not NAME"),
        ("cpu=lots", "is not a size"),
        ("cpu=0", "offers no memory"),
        ("0xl4", "0 devices"),
        ("999xl4", "999 devices"),
        ("cpu=-1GiB", "is not a size"),
        ("../cpu", "is not NAME"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused(option: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cluster_from_options([option])


def test_the_same_gpu_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="cuda:0 is given 2 times"):
        cluster_from_options(["cuda:0=1GiB", "cuda=2GiB"])


# --- margins ------------------------------------------------------------------------------------------------------


def budget(options: list[str], **changes: Any) -> int:
    open_device = device("cuda:0", kind="cuda", memory_bytes=10 * GIB, budget_bytes=None, **changes)
    return with_budgets(cluster(open_device), parse_margins(options)).devices[0].budget_bytes or 0


def test_a_margin_is_a_share_or_bytes_for_a_device_a_kind_or_all() -> None:
    assert budget(["10%"]) == 9 * GIB
    assert budget(["2GiB"]) == 8 * GIB
    assert budget(["1GiB", "cuda=3GiB"]) == 7 * GIB
    assert budget(["1GiB", "cuda=3GiB", "cuda:0=4GiB"]) == 6 * GIB
    assert budget(["0%"]) == 10 * GIB
    assert budget(["12.5%"]) == 10 * GIB - 10 * GIB // 8


def test_a_stated_budget_is_never_touched() -> None:
    fixed = cluster(device("cpu", memory_bytes=10 * GIB, budget_bytes=3 * GIB))
    assert with_budgets(fixed, parse_margins(["50%"])).devices[0].budget_bytes == 3 * GIB


@pytest.mark.parametrize("text", ["100%", "-1%", "x%", "%", "1/0%", "nan%", "10", "lots", ""])
def test_a_margin_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_margins([text])


def test_a_margin_in_bytes_needs_a_unit_where_it_could_be_meant_as_percent() -> None:
    with pytest.raises(UsageError, match="--margin 10 is 10 bytes; expected a unit: 10%, 2GiB"):
        parse_margins(["cuda=10"])
    assert [budget([text]) for text in ("0", "10B", "4096")] == [10 * GIB, 10 * GIB - 10, 10 * GIB - 4096]


def test_a_margin_for_a_device_that_is_not_there_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"gpu9.*cuda:0"):
        budget(["gpu9=1GiB"])


def test_a_margin_that_leaves_nothing_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match=r"margin of 11\.0 GiB leaves nothing of the 10\.0 GiB on cuda:0"):
        budget(["11GiB"])


@given(
    total=st.integers(1, 1 << 40),
    free=st.integers(0, 1 << 40),
    stated=st.lists(st.integers(1, 1 << 38), max_size=2),
    count=st.integers(1, 3),
    share=st.integers(0, 99),
)
def test_budgets_of_processors_never_exceed_what_is_free_on_their_host(
    total: int, free: int, stated: list[int], count: int, share: int
) -> None:
    free = min(free, total)
    fixed = [device(f"fixed{i}", memory_bytes=1 << 40, budget_bytes=size) for i, size in enumerate(stated)]
    open_ones = [device(f"open{i}", memory_bytes=total, budget_bytes=None) for i in range(count)]
    described = Cluster.model_construct(hosts=(Host(name="local", memory_bytes=total),), devices=(*fixed, *open_ones))
    names = {d.name: free for d in open_ones}
    try:
        filled = with_budgets(described, parse_margins([f"{share}%"]), free_bytes=names)
    except UsageError:
        return
    budgets = [d.budget_bytes or 0 for d in filled.devices[len(fixed) :]]
    assert all(b > 0 for b in budgets)
    assert sum(budgets) + sum(stated) <= free


# --- the catalogue ------------------------------------------------------------------------------------------------


def test_catalogue_names_are_unique_and_every_entry_makes_a_device() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names) >= 30
    for entry in CATALOGUE:
        made = entry.device(entry.name)
        assert made.memory_bandwidth_bytes_per_second < entry.bandwidth_gb * 1e9
        assert find_accelerator(entry.name.upper()) is entry


@pytest.mark.parametrize(
    ("product", "memory_gib", "name"),
    [
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "rtx4060ti"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80g"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA L4", 23, "l4"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA H100 PCIe", 80, "h100-pcie"),
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA A10", 24, "a10"),
        ("Tesla V100-SXM2-32GB", 32, "v100-32g"),
        ("NVIDIA GeForce GTX 1060", 6, None),
    ],
)
def test_products_are_recognised_as_drivers_name_them(product: str, memory_gib: int, name: str | None) -> None:
    found = recognise(product, memory_bytes=memory_gib * GIB)
    assert (found.name if found else None) == name


# --- cluster files ------------------------------------------------------------------------------------------------


def test_a_cluster_file_and_devices_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        load_cluster(tmp_path / "c.json", devices=["cpu"])


def test_a_missing_cluster_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_cluster(tmp_path / "c.json")
