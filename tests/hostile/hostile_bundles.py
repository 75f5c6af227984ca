"""Exports that must be refused. Each function gets a copy of a good one in three stages."""

import json
import os
import shutil
import sys
from pathlib import Path

from breaking import BAD_INPUT, INTEGRITY, Collection, edit, make_by_hand, read_shard, write_shard

from plans.export.manifest import Manifest

BUNDLES = Collection()
case = BUNDLES.case

MANIFEST = "manifest.json"


def weights(folder: Path, number: int) -> Path:
    """The safetensors file of a stage, counted from 1."""
    return next(folder.glob(f"model-{number:05d}-of-*.safetensors"))


def stage(folder: Path, number: int) -> Path:
    """The stage file of a stage, counted from 1."""
    return next(folder.glob(f"stage-{number:05d}-of-*.json"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


@case("B1", INTEGRITY)
def one_bit_of_the_last_weight(folder: Path) -> None:
    flip(weights(folder, 3), -1)


@case("B1", INTEGRITY)
def one_bit_of_a_shape_in_a_header(folder: Path) -> None:
    data = weights(folder, 2).read_bytes()
    flip(weights(folder, 2), data.index(b'"shape":[') + 9)


@case("B1", INTEGRITY)
def one_bit_of_the_plan(folder: Path) -> None:
    data = (folder / "plan.json").read_bytes()
    flip(folder / "plan.json", data.index(b'"strategy"') + 2)


@case("B2", INTEGRITY)
def a_tail_of_zeros_as_after_a_power_cut(folder: Path) -> None:
    path = weights(folder, 1)
    size = path.stat().st_size
    os.truncate(path, size - 4096)
    os.truncate(path, size)


@case("B2", INTEGRITY)
def a_copy_that_stopped_half_way(folder: Path) -> None:
    os.truncate(weights(folder, 2), weights(folder, 2).stat().st_size // 2)


@case("B3", INTEGRITY)
def one_stage_was_not_copied(folder: Path) -> None:
    weights(folder, 2).unlink()


@case("B3", INTEGRITY)
def a_foreign_tensor_with_honest_digests(folder: Path) -> None:
    table, data = read_shard(weights(folder, 2))
    table["model.layers.0.self_attn.extra.weight"] = {
        "dtype": "BF16",
        "shape": [2],
        "data_offsets": [len(data), len(data) + 4],
    }
    write_shard(weights(folder, 2), table, data + bytes(4))
    record_again(folder, weights(folder, 2).name)


@case("B3", INTEGRITY)
def a_missing_tensor_with_honest_digests(folder: Path) -> None:
    table, data = read_shard(weights(folder, 2))
    last = max((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"][0])
    start = table.pop(last)["data_offsets"][0]
    write_shard(weights(folder, 2), table, data[:start])
    record_again(folder, weights(folder, 2).name)


@case("B4", INTEGRITY)
def two_stages_swapped(folder: Path) -> None:
    swap(weights(folder, 1), weights(folder, 2))
    swap(stage(folder, 1), stage(folder, 2))


@case("B4", INTEGRITY)
def one_stage_in_place_of_another_with_honest_digests(folder: Path) -> None:
    shutil.copy(weights(folder, 1), weights(folder, 2))
    record_again(folder, weights(folder, 2).name)


@case("B5", INTEGRITY)
def a_stage_file_of_another_export(folder: Path) -> None:
    edit(stage(folder, 1), export_id="ab" * 32)


@case("B6", BAD_INPUT)
def a_manifest_that_climbs_out(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    document["files"][0]["path"] = "../../etc/passwd"
    (folder / MANIFEST).write_text(json.dumps(document))


@case("B6", BAD_INPUT)
def a_manifest_of_50_megabytes(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 50 << 20)


@case("B6", BAD_INPUT)
def weights_behind_a_link(folder: Path) -> None:
    path = weights(folder, 1)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


@case("B6", BAD_INPUT)
def a_pipe_instead_of_a_stage_file(folder: Path) -> None:
    path = stage(folder, 2)
    path.unlink()
    os.mkfifo(path)


@case("B7", INTEGRITY)
def a_manifest_whose_id_was_not_renewed(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    document["source"][0]["sha256"] = "00" * 32
    (folder / MANIFEST).write_text(Manifest.model_validate_json(json.dumps(document)).to_json())


@case("B8", INTEGRITY)
def fp16_called_bf16_with_honest_digests(folder: Path) -> None:
    table, data = read_shard(weights(folder, 2))
    for name, entry in table.items():
        if name != "__metadata__":
            entry["dtype"] = "F16"
    write_shard(weights(folder, 2), table, data)
    record_again(folder, weights(folder, 2).name)


@case("B12", BAD_INPUT)
def a_manifest_of_a_later_version(folder: Path) -> None:
    edit(folder / MANIFEST, schema_version=2, signature="later")


def record_again(folder: Path, name: str) -> None:
    """Renew size, digests, export id and stage files after a change, as an attacker would."""
    from plans.reading.digest import digest_file

    document = json.loads((folder / MANIFEST).read_text())
    found = digest_file(folder / name)
    entry = {"path": name, "size": found.size, "sha256": found.sha256, "xxh3_128": found.xxh3_128}
    document["files"] = [entry if file["path"] == name else file for file in document["files"]]
    draft = Manifest.model_validate_json(json.dumps(document))
    manifest = draft.model_copy(update={"export_id": draft.derived_id()})
    (folder / MANIFEST).write_text(manifest.to_json())
    for number in range(1, len(manifest.stages) + 1):
        stage(folder, number).write_text(manifest.stage_json(number - 1))


if __name__ == "__main__":
    make_by_hand(BUNDLES, Path(sys.argv[3]), sys.argv[1:3])
