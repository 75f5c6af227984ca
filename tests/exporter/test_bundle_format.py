"""The format as `docs/bundle-format.md` states it, checked with nothing but the standard library."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from export_helpers import make_plan

from exporter import export


def canonical(document: object) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


@pytest.fixture(scope="module")
def folder(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("format") / "out"
    export(make_plan(shipped, [0, 4, 3]), model=shipped, output=out)
    return out


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return found


def headers(folder: Path) -> list[tuple[bytes, dict[str, Any], bytes]]:
    found = []
    for path in sorted(folder.glob("model-*.safetensors")):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found.append((data[8:end], json.loads(data[8:end]), data[end:]))
    return found


def test_the_export_id_is_the_hash_of_the_canonical_manifest_without_it(folder: Path, manifest: dict[str, Any]) -> None:
    assert (folder / "manifest.json").read_bytes() == canonical(manifest)
    body = {key: value for key, value in manifest.items() if key != "export_id"}
    assert manifest["export_id"] == hashlib.sha256(canonical(body)).hexdigest()


def test_every_file_is_listed_with_its_digest_or_derived(folder: Path, manifest: dict[str, Any]) -> None:
    listed = {file["path"] for file in manifest["files"]}
    derived = {f"stage-{i:05d}-of-00003.json" for i in (1, 2, 3)} | {"manifest.json"}
    assert {path.name for path in folder.iterdir()} == listed | derived
    for file in manifest["files"]:
        data = (folder / file["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"])
    assert manifest["plan_sha256"] == hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()


def test_a_stage_file_repeats_its_stage_with_the_export_id(folder: Path, manifest: dict[str, Any]) -> None:
    files = {file["path"]: file for file in manifest["files"]}
    for index, stage in enumerate(manifest["stages"]):
        expected = {key: value for key, value in stage.items() if key != "file"} | {
            "schema_version": 1,
            "export_id": manifest["export_id"],
            "plan_sha256": manifest["plan_sha256"],
            "dtype": manifest["dtype"],
            "stage": index,
            "num_stages": 3,
            "weights": files[stage["file"]],
        }
        assert (folder / f"stage-{index + 1:05d}-of-00003.json").read_bytes() == canonical(expected)


def test_headers_are_canonical_aligned_and_without_holes(folder: Path, manifest: dict[str, Any]) -> None:
    for index, (raw, table, data) in enumerate(headers(folder)):
        text = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
        assert raw.rstrip(b" ") == text
        assert (8 + len(raw)) % 64 == 0
        assert len(raw) - len(text) < 64
        assert table.pop("__metadata__") == {
            "format": "pt",
            "llamaplan_stage": str(index),
            "llamaplan_num_stages": "3",
            "llamaplan_plan_sha256": manifest["plan_sha256"],
        }
        spans = sorted(entry["data_offsets"] for entry in table.values())
        assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == len(data)


def test_tensors_lie_in_chain_order(folder: Path) -> None:
    def place(name: str) -> tuple[int, int, str]:
        if name == "model.embed_tokens.weight":
            return 0, 0, name
        return (1, int(name.split(".")[2]), name) if ".layers." in name else (2, 0, name)

    order = []
    for _, table, _ in headers(folder):
        table.pop("__metadata__")
        order += sorted(table, key=lambda name: table[name]["data_offsets"][0])
    assert order == sorted(order, key=place)


def test_the_safetensors_library_reads_every_stage_file(folder: Path) -> None:
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            assert all(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - not a dict


def test_larger_elements_come_first_so_that_every_tensor_is_aligned(tmp_path: Path) -> None:
    from export_helpers import make_llama
    from safetensors.torch import load_file, save_file

    model = make_llama(tmp_path / "model", vocab_size=33, hidden_size=36, intermediate_size=35, num_attention_heads=6)
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].float()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    manifest = export(make_plan(model, [2, 3]), model=model, output=tmp_path / "out")
    assert manifest.dtype == "mixed"
    for _, table, _ in headers(tmp_path / "out"):
        table.pop("__metadata__")
        for entry in table.values():
            assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0
    again = {name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    assert all(again[name].equal(tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)
