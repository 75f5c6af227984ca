"""Checkpoints that must be refused. Each function gets a copy of a good one: config.json and one model.safetensors."""

import os
import sys
from pathlib import Path

from breaking import BAD_INPUT, INTEGRITY, Collection, edit, make_by_hand, read_shard, write_shard

CHECKPOINTS = Collection()
case = CHECKPOINTS.case

CONFIG, SHARD, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


def with_index(folder: Path, **extra: str) -> dict[str, str]:
    """Give the checkpoint an index, and two more entries if wanted."""
    table, _ = read_shard(folder / SHARD)
    (folder / "model-00001-of-00001.safetensors").write_bytes((folder / SHARD).read_bytes())
    (folder / SHARD).unlink()
    weight_map = {name: "model-00001-of-00001.safetensors" for name in table if name != "__metadata__"} | extra
    (folder / INDEX).write_text("{}")
    edit(folder / INDEX, weight_map=weight_map)
    return weight_map


@case("C1", BAD_INPUT)
def an_empty_folder(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / SHARD).unlink()


@case("C3", BAD_INPUT)
def a_truncated_config(folder: Path) -> None:
    data = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(data[: len(data) // 2])


@case("C4", BAD_INPUT)
def a_config_nested_a_hundred_thousand_deep(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b'{"a":' * 100_000)


@case("C4", BAD_INPUT)
def a_config_with_a_5000_digit_number(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b'{"vocab_size": ' + b"9" * 5000 + b"}")


@case("C5", BAD_INPUT)
def a_config_of_200_megabytes(folder: Path) -> None:
    os.truncate(folder / CONFIG, 200 << 20)


@case("C6", BAD_INPUT)
def a_billion_layers(folder: Path) -> None:
    edit(folder / CONFIG, num_hidden_layers=10**9)


@case("C7", BAD_INPUT)
def kv_heads_that_do_not_divide_the_heads(folder: Path) -> None:
    edit(folder / CONFIG, num_key_value_heads=3)


@case("C10", BAD_INPUT)
def an_unknown_rope_type(folder: Path) -> None:
    edit(folder / CONFIG, rope_parameters=None, rope_scaling={"rope_type": "spiral", "factor": 2.0})


@case("C11", BAD_INPUT)
def only_a_pickle(folder: Path) -> None:
    (folder / SHARD).rename(folder / "pytorch_model.bin")


@case("C13", BAD_INPUT)
def an_index_that_climbs_out(folder: Path) -> None:
    with_index(folder, **{"model.extra.weight": "../secret.safetensors"})


@case("C13", BAD_INPUT)
def an_index_with_an_absolute_path(folder: Path) -> None:
    with_index(folder, **{"model.extra.weight": "/etc/passwd"})


@case("C13", BAD_INPUT)
def an_index_with_an_overlong_name(folder: Path) -> None:
    with_index(folder, **{"model.extra.weight": "x" * 300})


@case("C14", BAD_INPUT)
def a_pipe_instead_of_weights(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)


@case("C14", BAD_INPUT)
def a_link_out_of_the_folder(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "outside.safetensors")
    (folder / SHARD).symlink_to(folder.parent / "outside.safetensors")


@case("C14", BAD_INPUT)
def a_tokenizer_that_links_out_of_the_folder(folder: Path) -> None:
    """Only `export` reads it; following the link would copy somebody's secret into the export."""
    (folder.parent / "secret").write_text("secret")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.json").symlink_to(folder.parent / "secret")


@case("C15", BAD_INPUT)
def a_shard_the_index_lists_is_missing(folder: Path) -> None:
    with_index(folder, **{"model.extra.weight": "model-00002-of-00002.safetensors"})


@case("C17", BAD_INPUT)
def a_header_of_an_exabyte(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])


@case("C17", BAD_INPUT)
def seven_bytes(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"\x10" * 7)


@case("C18", INTEGRITY)
def a_shard_one_byte_short(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


@case("C18", INTEGRITY)
def bytes_after_the_last_tensor(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(b"more")


@case("C18", INTEGRITY)
def a_hole_between_tensors(folder: Path) -> None:
    table, data = read_shard(folder / SHARD)
    table[NORM]["data_offsets"] = [offset + 64 for offset in table[NORM]["data_offsets"]]
    write_shard(folder / SHARD, table, data + bytes(64))


@case("C18", INTEGRITY)
def two_tensors_that_overlap(folder: Path) -> None:
    table, data = read_shard(folder / SHARD)
    first = next(name for name in table if name not in {NORM, "__metadata__"} and table[name]["data_offsets"][0] == 0)
    size = table[NORM]["data_offsets"][1] - table[NORM]["data_offsets"][0]
    assert table[first]["data_offsets"][1] >= size
    table[NORM]["data_offsets"] = [0, size]
    write_shard(folder / SHARD, table, data)


@case("C19", BAD_INPUT)
def a_shape_that_overflows(folder: Path) -> None:
    table, data = read_shard(folder / SHARD)
    table[NORM]["shape"] = [2**61, 2**61]
    write_shard(folder / SHARD, table, data)


@case("C19", BAD_INPUT)
def a_negative_shape(folder: Path) -> None:
    table, data = read_shard(folder / SHARD)
    table[NORM]["shape"] = [-32]
    write_shard(folder / SHARD, table, data)


@case("C20", BAD_INPUT)
def one_name_twice_in_a_header(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip()
    name = f'"{NORM}":'.encode()
    start = text.index(name)
    entry = text[start : text.index(b"}", start) + 1]
    write_shard(folder / SHARD, text[:-1] + b"," + entry + b"}", data[8 + length :])


@case("C21", BAD_INPUT)
def a_million_empty_tensors(folder: Path) -> None:
    row = b'"model.e%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    write_shard(folder / SHARD, b"{" + b",".join(row % i for i in range(300_000)) + b"}", b"")


@case("C22", BAD_INPUT)
def an_unknown_dtype(folder: Path) -> None:
    table, data = read_shard(folder / SHARD)
    table[NORM]["dtype"] = "F7"
    write_shard(folder / SHARD, table, data)


@case("C23", BAD_INPUT)
def no_head_although_nothing_is_tied(folder: Path) -> None:
    rename(folder, "lm_head.weight", "lm_tail.weight")


def rename(folder: Path, old: str, new: str) -> None:
    table, data = read_shard(folder / SHARD)
    table[new] = table.pop(old)
    write_shard(folder / SHARD, table, data)


@case("C24", BAD_INPUT)
def a_layer_beyond_the_last(folder: Path) -> None:
    rename(folder, "model.layers.0.input_layernorm.weight", "model.layers.99.input_layernorm.weight")


@case("C24", BAD_INPUT)
def an_embedding_of_another_shape_than_the_config_says(folder: Path) -> None:
    edit(folder / CONFIG, vocab_size=97)


@case("C26", BAD_INPUT)
def a_git_lfs_pointer(folder: Path) -> None:
    (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@case("C26", BAD_INPUT)
def an_html_page(folder: Path) -> None:
    (folder / SHARD).write_text("<!DOCTYPE html><html><body>Sign in</body></html>" * 20)


@case("C27", BAD_INPUT)
def a_link_to_a_blob_that_was_never_fetched(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to("../../blobs/0123456789abcdef")


@case("C28", BAD_INPUT)
def a_tensor_name_with_terminal_escapes(folder: Path) -> None:
    rename(folder, NORM, "model.norm\x1b[2J\x1b]0;owned\x07.weight")


@case("C28", BAD_INPUT)
def a_tensor_name_that_climbs_out(folder: Path) -> None:
    rename(folder, NORM, "../../../../tmp/owned")


@case("C28", BAD_INPUT)
def a_tensor_name_of_64_kilobytes(folder: Path) -> None:
    rename(folder, NORM, "x" * 65536)


if __name__ == "__main__":
    make_by_hand(CHECKPOINTS, Path(__file__).parents[1] / "checkpoint" / "python-llama", sys.argv[1:])
