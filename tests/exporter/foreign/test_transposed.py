"""Symmetric GPTQ and AWQ become packed weights of the same numbers; what is not symmetric is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import edit_json, make_plan, tensor_bytes
from safetensors.torch import load_file, save_file

from exporter import export, verify
from exporter.foreign.opening import open_origin
from planner.answers.recut import recut
from planner.model.profile import build_profile
from plans.errors import InputError, UsageError
from tests.conftest import RunCommand
from tests.exporter.foreign.test_gguf_export import tensors, unpacked

Models = Callable[..., Path]
BASE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "dtype": "float16"}
GROUP = 32
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in nibble 0, 1, 2 ... of a word: `order_map` of AutoAWQ."""


def words(numbers: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Pack eight neighbours of the last dimension into one word, nibble by nibble."""
    packed = torch.zeros(*numbers.shape[:-1], numbers.shape[-1] // 8, dtype=torch.int64)
    for nibble, place in enumerate(order):
        packed |= numbers[..., place::8].long() << (4 * nibble)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def gptq(numbers: torch.Tensor, zeros: torch.Tensor, *, less: int) -> dict[str, torch.Tensor]:
    """`qweight` and `qzeros` of [in, out] numbers and [groups, out] zeros."""
    straight = tuple(range(8))
    return {
        "qweight": words(numbers.T, straight).T.contiguous(),
        "qzeros": words(zeros - less, straight),
        "g_idx": (torch.arange(len(numbers)) // GROUP).int(),
    }


def awq(numbers: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"qweight": words(numbers, AWQ_NIBBLES), "qzeros": words(zeros, AWQ_NIBBLES)}


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": False, "version": "gemm"},
}


def quantised(models: Models, folder: Path, kind: str, *, zero: int = 8) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a model of this kind; return it, and its weights by the formula (number - zero) x scale."""
    return quantised_copy(models(**BASE), folder, kind, zero=zero)


def quantised_copy(source: Path, folder: Path, kind: str, *, zero: int = 8) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same of a given model, all of whose layers' matrices but routers are replaced."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    (folder / "quantize_config.json").write_text("{}")
    edit_json(folder / "config.json", quantization_config=CONFIGS[kind])
    found, weights = load_file(source / "model.safetensors"), {}
    for name in [name for name in found if name.endswith("proj.weight") or ".experts." in name]:
        out, inputs = found.pop(name).shape
        module = name.removesuffix(".weight")
        numbers = torch.randint(0, 16, (inputs, out))
        zeros = torch.full((inputs // GROUP, out), zero)
        scales = (torch.rand(inputs // GROUP, out) / 50).half()
        parts = awq(numbers, zeros) if kind == "awq" else gptq(numbers, zeros, less=int(kind == "gptq"))
        found |= {f"{module}.{part}": tensor for part, tensor in (parts | {"scales": scales}).items()}
        each = torch.arange(inputs) // GROUP
        weights[module] = ((numbers - zeros[each]).half() * scales[each]).T
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, weights


@pytest.mark.parametrize("kind", CONFIGS)
def test_symmetric_weights_are_repacked_to_the_bit(kind: str, models: Models, tmp_path: Path) -> None:
    model, weights = quantised(models, tmp_path / "model", kind)
    origin = open_origin(model)
    plan = recut(make_plan(model, [1, 1]), build_profile(origin.checkpoint))
    export(plan, model=origin, output=tmp_path / "out")
    found = tensors(tmp_path / "out")
    for module, wanted in weights.items():
        assert torch.equal(unpacked(found, module), wanted)
    assert not any(name.endswith(("qweight", "qzeros", "scales", "g_idx")) for name in found)
    assert verify(tmp_path / "out", model=model).num_tensors_compared == len(found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert not (tmp_path / "out" / "quantize_config.json").exists()


@pytest.mark.parametrize("kind", CONFIGS)
def test_repacked_experts_are_loaded_by_transformers_as_their_numbers_times_scales(kind: str, tmp_path: Path) -> None:
    """llamarun refuses them; the export is for other engines."""
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **BASE, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, num_local_experts=4, pad_token_id=0
    )
    MixtralForCausalLM(config).half().save_pretrained(tmp_path / "source")
    model, weights = quantised_copy(tmp_path / "source", tmp_path / "model", kind)
    origin = open_origin(model)
    plan = recut(make_plan(model, [1, 1]), build_profile(origin.checkpoint))
    export(plan, model=origin, output=tmp_path / "out")
    assert len([module for module in weights if ".experts." in module]) == 2 * 4 * 3
    assert sum(stage.weight_bytes for stage in plan.stages) == sum(map(len, tensor_bytes(tmp_path / "out").values()))
    path = tmp_path / "source" / "model.safetensors"
    plain = {f"{module}.weight": weight.contiguous() for module, weight in weights.items()}
    save_file(load_file(path) | plain, path, metadata={"format": "pt"})
    with torch.inference_mode():
        ours, expected = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()(torch.arange(9)[None]).logits
            for folder in (tmp_path / "out", tmp_path / "source")
        )
    assert torch.equal(ours, expected)


def change(**tensors_: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change every tensor with this last part of its name."""

    def apply(model: Path) -> None:
        found = load_file(model / "model.safetensors")
        for name, tensor in found.items():
            found[name] = tensors_.get(name.rpartition(".")[2], lambda same: same)(tensor).contiguous()
        save_file(found, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit_json(model / "config.json", quantization_config={**CONFIGS["gptq"], **changes})


def without(part: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        found = load_file(model / "model.safetensors")
        kept = {name: tensor for name, tensor in found.items() if not name.endswith(part)}
        save_file(kept, model / "model.safetensors", metadata={"format": "pt"})

    return apply


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "act-order": (change(g_idx=lambda order: order.flip(0)), r"g_idx puts inputs into groups in another order"),
    "no zeros": (without("qzeros"), r"qweight is quantised \(I32\) and has no .*qzeros"),
    "zeros of another shape": (change(qzeros=lambda zeros: zeros[:1]), r"qzeros has shape \[1, 8\]"),
    "scales of another shape": (change(scales=lambda scales: scales[:, :8]), r"scales has shape \[[24], 8\]"),
    "another layout": (settings(checkpoint_format="marlin"), "checkpoint_format marlin are not repacked"),
    "another width": (settings(bits=3), "bits 3 are not repacked"),
    "an odd group": (settings(group_size=48), "group_size 48 are not repacked"),
    "W8A8": (
        settings(quant_method="compressed-tensors", config_groups={"a": {"input_activations": {"num_bits": 8}}}),
        r"input_activations of 8 bits \(W8A8\) are not repacked"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_packed_form_is_refused_by_name(case: str, models: Models, tmp_path: Path) -> None:
    alter, words_ = REFUSED[case]
    model, _ = quantised(models, tmp_path / "model", "gptq")
    alter(model)
    with pytest.raises(InputError, match=words_):
        open_origin(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_asymmetric_weights_are_refused_and_copied_on_request(
    kind: str, models: Models, tmp_path: Path, run_command: RunCommand
) -> None:
    model, _ = quantised(models, tmp_path / "model", kind, zero=7)
    (tmp_path / "plan.json").write_text(make_plan(model, [1, 1]).to_json())
    command = ("llamaplan", "export", tmp_path / "plan.json", "--model", model, "-o", tmp_path / "out")
    refused = run_command(*command)
    assert refused.code == 3
    assert "qzeros holds 7: the numbers are not symmetric around 8" in refused.err
    assert "--as-stored copies the weights as they are" in refused.err
    assert run_command(*command, "--as-stored").code == 0
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(model)
    assert verify(tmp_path / "out", model=model).num_tensors_compared == len(tensor_bytes(model))


def test_the_forms_belong_to_files_or_to_folders(models: Models, gguf_of: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=r"--requantise int8 is for GGUF files; .*--weights"):
        open_origin(models(**BASE), form="int8")
    with pytest.raises(UsageError, match="--as-stored is for folders"):
        open_origin(gguf_of("Q8_0"), form="as stored")
