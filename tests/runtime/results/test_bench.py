"""`llamarun bench`, bytes read per step, and the walk of `--verbose`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig
from transformers.cache_utils import Cache

from exporter import export
from plans.run import Bench
from plans.stages import StageRange
from runtime import load
from runtime.engine.run import generate
from runtime.generate.limits import Limits
from runtime.generate.sampling import Sampling
from runtime.stages.traffic import decode_read_bytes, read_bandwidth
from tests.conftest import RunCommand
from tests.exporter.export_helpers import make_plan

OPTIONS = ("--device-map", "cpu", "--prompt-tokens", 6, "--new-tokens", 4, "--repeats", 2)


@pytest.fixture(scope="module")
def shards(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "shards"
    export(make_plan(shipped, [2, 4, 1]), model=shipped, output=folder)
    return folder


def test_bench_measures_every_stage_and_names_the_prediction(shards: Path, run_command: RunCommand) -> None:
    done = run_command("llamarun", "bench", shards, *OPTIONS, "--batch-size", 2, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert Bench.from_json(done.out.encode(), where="stdout").as_json() == document
    for key in ("load_seconds", "time_to_first_token_seconds", "median_seconds_per_token", "peak_memory_bytes"):
        assert document[key] > 0
    assert document["tokens_per_second"] == pytest.approx(2 / document["median_seconds_per_token"])
    read = document["decode_read_bytes"] / document["median_seconds_per_token"]
    assert document["decode_read_bytes_per_second"] == pytest.approx(read)
    assert document["read_bandwidth_bytes_per_second"]["cpu"] > 0
    assert document["decode_read_bytes"] == sum(stage["decode_read_bytes"] for stage in document["stages"])
    assert [(s["start_layer"], s["end_layer"]) for s in document["stages"]] == [(0, 2), (2, 6), (6, 7)]
    assert len(document["prediction"]["stages"]) == 3


def test_the_stages_of_a_bench_have_the_form_of_a_run(shards: Path, run_command: RunCommand) -> None:
    bench = json.loads(run_command("llamarun", "bench", shards, *OPTIONS, "--json").out)
    options = ["-p", "x", "-n", 3, "--ignore-eos", "--device-map", "cpu", "--json"]
    run = json.loads(run_command("llamarun", "generate", shards, *options).out)
    assert [set(stage) for stage in bench["stages"]] == [set(stage) for stage in run["stages"]]
    run = json.loads(run_command("llamarun", "generate", shards, *options, "--speed", "reference").out)
    assert all(stage["decode_cache_seconds"] > 0 for stage in run["stages"])
    assert all(stage["decode_cache_seconds"] < stage["decode_compute_seconds"] for stage in run["stages"])


def test_bench_prints_a_summary_with_gigabytes_per_second(shards: Path, shipped: Path, run_command: RunCommand) -> None:
    said = run_command("llamarun", "bench", shards, *OPTIONS).out
    for part in ("load", "prefill", "decode", "GB/s", "reading", "plan     predicted", "stage 2 on cpu"):
        assert part in said
    assert "predicted" not in run_command("llamarun", "bench", shipped, *OPTIONS).out


def test_bench_refuses_what_the_context_does_not_hold(shipped: Path, run_command: RunCommand) -> None:
    done = run_command("llamarun", "bench", shipped, "--prompt-tokens", 1000, "--new-tokens", 25)
    assert done.code == 2
    assert "1024" in done.err


def test_a_decode_step_reads_every_weight_but_the_embedding_table(tiny: Path, tiny_config: LlamaConfig) -> None:
    cuts = [
        StageRange("cpu", 0, 1, has_embedding=True, has_head=False),
        StageRange("cpu", 1, 4, has_embedding=False, has_head=True),
    ]
    chain = load(tiny, stages=cuts, dtype="fp32")
    table = chain.base_model.embed_tokens.weight
    everything = sum(parameter.nbytes for parameter in chain.parameters())
    read = [decode_read_bytes(chain, index, batch_size=3) for index in range(2)]
    assert sum(read) == everything - table.nbytes + 3 * tiny_config.hidden_size * 4
    assert all(rate > 0 for rate in read_bandwidth(chain, repeats=1).values())


def test_a_mixture_of_experts_reads_only_the_experts_it_expects_to_choose(
    make_checkpoint: Callable[..., Path],
) -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    chain = load(make_checkpoint(config), dtype="fp32")
    experts = sum(p.nbytes for name, p in chain.named_parameters() if ".experts." in name)
    one, many = (decode_read_bytes(chain, 0, batch_size=size) for size in (1, 1000))
    assert many - one == pytest.approx(experts / 2 + 999 * 32 * 4, abs=2)


def test_verbose_walks_through_every_stage_of_every_step(shards: Path, run_command: RunCommand) -> None:
    options = ["-p", "def f(", "-n", 3, "--temp", 0, "--ignore-eos", "--device-map", "cpu"]
    plain = run_command("llamarun", "generate", shards, *options, "-q")
    done = run_command("llamarun", "generate", shards, *options, "--verbose")
    assert done.out == plain.out
    lines = done.err.splitlines()
    assert [line for line in lines if line.startswith(("prefill", "decode"))] == [
        "prefill: 4 tokens, 0 in the cache",
        "decode 1: 1 tokens, 4 in the cache",
        "decode 2: 1 tokens, 5 in the cache",
    ]
    stages = [line for line in lines if line.startswith("  stage") and "->" in line]
    assert len(stages) == 9
    assert "stage 0 on cpu (embedding, layers 0-1): ids [1, 4] -> hidden [1, 4, 192]" in stages[0]
    assert "stage 1 on cpu (layers 2-5): hidden [1, 4, 192] -> hidden [1, 4, 192]" in stages[1]
    assert "stage 2 on cpu (layer 6, head): hidden [1, 1, 192] -> logits [1, 1, 2048]" in stages[8]
    assert all("hop" in line and "compute" in line for line in stages)
    assert sum(line.startswith("  -> token") for line in lines) == 3


def test_the_clocks_change_no_token_and_are_gone_afterwards(tiny: Path) -> None:
    chain, update = load(tiny, dtype="fp32"), Cache.update
    limits = Limits(context_tokens=64, max_tokens=6)
    runs = [
        generate(chain, [[3, 4, 5]], sampling=Sampling(), limits=limits, measure_stages=measured)
        for measured in (False, True, False)
    ]
    assert len({run.sequences[0].token_ids for run in runs}) == 1
    assert Cache.update is update
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in chain.modules())
