"""Exports of GGUF files: which weights they hold, to the bit, and what is refused."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from export_helpers import make_plan, tensor_bytes, tree
from safetensors import safe_open

from exporter import export, verify
from exporter.foreign.opening import open_origin
from planner.answers.recut import recut
from planner.model.profile import build_profile
from plans.errors import InputError, IntegrityError
from plans.gguf.names import model_name
from plans.reading.sizes import format_bytes
from tests.conftest import RunCommand
from tests.gguf_files import config_for, write_gguf
from tests.gguf_models import all_of, in_pairs, write_model

GgufOf = Callable[[str], Path]


def exported(path: Path, output: Path, *, form: str | None = None, cut: tuple[int, ...] = (3, 2, 2)) -> Path:
    """Export a file as the command does."""
    origin = open_origin(path, form=form)  # type: ignore[arg-type]
    export(recut(make_plan(path, cut), build_profile(origin.checkpoint)), model=origin, output=output)
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def of_the_file(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF file in fp32, by the package `gguf`, in the order that the model has its rows in."""
    reader, found = gguf.GGUFReader(path), {}
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(tensor.name.split(".")[-2])
        if heads:  # where every row went, found by sending row numbers the same way
            count = int(reader.fields[f"llama.attention.{heads}"].contents())
            weights = weights[np.argsort(in_pairs(np.arange(len(weights))[:, None], count)[:, 0])]
        found[model_name(tensor.name, architecture="llama", num_experts=0, where="test")] = weights
    return found


def unpacked(found: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """What compressed-tensors makes of a packed module."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    sides, scale = torch.Size(found[f"{module}.weight_shape"].tolist()), found[f"{module}.weight_scale"]
    packed = found[f"{module}.weight_packed"]
    whole = unpack_from_int32(packed, 32 * packed.shape[1] // sides[1], sides)
    return (whole.to(scale.dtype).reshape(*scale.shape, 32) * scale[..., None]).reshape(sides)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_keep_every_bit(kind: str, gguf_of: GgufOf, tmp_path: Path) -> None:
    found = tensors(exported(gguf_of(kind), tmp_path / "out"))
    for name, weights in of_the_file(gguf_of(kind)).items():
        assert found[name].dtype == (torch.float32 if "norm" in name else gguf_dtypes[kind])
        assert np.array_equal(found[name].float().numpy(), weights)


gguf_dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_packed_types_keep_every_bit(kind: str, bits: int, gguf_of: GgufOf, tmp_path: Path) -> None:
    """Numbers and scales as they are; a table that is looked up is what the file says, in fp16."""
    path = gguf_of(kind)
    found = tensors(exported(path, tmp_path / "out"))
    for name, weights in of_the_file(path).items():
        expected = torch.tensor(weights).half()
        module = name.removesuffix(".weight")
        if module.endswith("_proj") or module == "lm_head":
            assert found[f"{module}.weight_packed"].shape == (weights.shape[0], weights.shape[1] * bits // 32)
            assert found[f"{module}.weight_scale"].dtype == torch.float16
            assert torch.equal(unpacked(found, module), expected)
        else:
            assert torch.equal(found[name].half(), expected)


def test_transformers_loads_the_export_with_the_files_own_logits(gguf_of: GgufOf, tmp_path: Path) -> None:
    """transformers' own loader of GGUF files, which unpacks them, against compressed-tensors."""
    from transformers import AutoModelForCausalLM, GgufConfig

    path = gguf_of("Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
    )
    ours = AutoModelForCausalLM.from_pretrained(exported(path, tmp_path / "out"), dtype=torch.float16)
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_a_split_file_gives_the_same_weights(shipped: Path, gguf_of: GgufOf, tmp_path: Path) -> None:
    first = write_model(shipped, tmp_path / "a{}.gguf", kinds=all_of("Q4_0"))
    ours, whole = exported(first, tmp_path / "split"), exported(gguf_of("Q4_0"), tmp_path / "whole")
    assert tensor_bytes(ours) == tensor_bytes(whole)
    assert verify(ours, model=first).num_tensors_compared == len(tensor_bytes(ours))


@pytest.mark.parametrize(("kind", "form"), [("Q8_0", None), ("Q4_1", "bf16"), ("Q5_0", "int8")])
def test_an_export_is_verified_against_the_file(kind: str, form: str | None, gguf_of: GgufOf, tmp_path: Path) -> None:
    """Whichever form it was given, and not against another file."""
    out = exported(gguf_of(kind), tmp_path / "out", form=form)
    assert verify(out, model=gguf_of(kind)).num_tensors_compared == len(tensor_bytes(out))
    with pytest.raises(IntegrityError, match=r"another model|differs from the model's"):
        verify(out, model=gguf_of("F16"))


def test_other_types_are_refused_with_both_ways_out(gguf_of: GgufOf) -> None:
    path = gguf_of("Q4_1")
    with pytest.raises(InputError, match=r"holds Q4_1 \(51 tensors\), which have no form without loss") as caught:
        open_origin(path)
    for form in ("int8", "bf16"):
        tensors_ = open_origin(path, form=form).checkpoint.tensors.values()  # type: ignore[arg-type]
        assert f"--requantise {form}" in caught.value.hint
        assert format_bytes(sum(stored.entry.size_bytes for stored in tensors_)) in caught.value.hint


def test_bf16_on_request_is_the_file_rounded_once(gguf_of: GgufOf, tmp_path: Path) -> None:
    path = gguf_of("Q4_1")
    found = tensors(exported(path, tmp_path / "out", form="bf16"))
    for name, weights in of_the_file(path).items():
        assert torch.equal(found[name], torch.tensor(weights).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_int8_on_request_is_close_and_says_how_close(gguf_of: GgufOf, tmp_path: Path, run_command: RunCommand) -> None:
    path, plan = gguf_of("Q5_1"), tmp_path / "plan.json"
    plan.write_text(make_plan(path, (3, 2, 2)).to_json())
    done = run_command("llamaplan", "export", plan, "--model", path, "-o", tmp_path / "out", "--requantise", "int8")
    assert done.code == 0, done.err
    found, moved, size = tensors(tmp_path / "out"), 0.0, 0.0
    for name, weights in of_the_file(path).items():
        module = name.removesuffix(".weight")
        ours = unpacked(found, module) if f"{module}.weight_packed" in found else found[name]
        if "norm" not in name:
            moved += float(((ours.double().numpy() - weights) ** 2).sum())
            size += float((weights.astype(np.float64) ** 2).sum())
    assert f"tensors were rounded by {(moved / size) ** 0.5:.2g} of their size" in done.err
    assert (moved / size) ** 0.5 < 0.01


def test_types_that_are_not_read_are_named(shipped: Path, tmp_path: Path) -> None:
    path = write_model(shipped, tmp_path / "a.gguf", kinds=lambda name: "TQ1_0" if "ffn_down" in name else "F16")
    for form in (None, "bf16", "int8"):
        with pytest.raises(InputError, match=r"TQ1_0 is not read here; llama-quantize --allow-requantize"):
            open_origin(path, form=form)  # type: ignore[arg-type]


def test_nvfp4_is_refused_by_its_type_with_scales_too(tmp_path: Path) -> None:
    def kinds(_name: str, shape: tuple[int, ...]) -> str:
        return "NVFP4" if len(shape) > 1 else "F32"

    path = write_gguf(tmp_path / "a.gguf", config_for("llama"), kinds=kinds, more={"blk.1.ffn_up.scale": (1,)})
    with pytest.raises(InputError, match=r"NVFP4 is not read here; llama-quantize --allow-requantize"):
        open_origin(path, form=None)


def test_equal_files_give_equal_bytes(gguf_of: GgufOf, tmp_path: Path) -> None:
    first, again = (exported(gguf_of("Q4_0"), tmp_path / name) for name in ("a", "b"))
    assert tree(first) == tree(again)


def test_a_scale_that_is_no_number_is_named(gguf_of: GgufOf, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    data = bytearray(gguf_of("Q8_0").read_bytes())
    place = next(t.data_offset for t in gguf.GGUFReader(gguf_of("Q8_0")).tensors if t.name == "blk.1.ffn_up.weight")
    data[int(place) : int(place) + 2] = b"\x00\x7e"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"blk\.1\.ffn_up\.weight holds scales that are no numbers"):
        exported(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_is_bounded_by_chunks(tmp_path: Path, models: Callable[..., Path]) -> None:
    """A table of 48 MiB is made without ever being in memory."""
    big = models(vocab_size=98304, hidden_size=256, intermediate_size=64, num_hidden_layers=1)
    path = write_model(big, tmp_path / "a.gguf", kinds=all_of("Q8_0"))
    exported(path, tmp_path / "small", cut=(1,))  # whatever is imported and measured once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exported(path, tmp_path / "out", cut=(1,))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 << 10  # KiB
