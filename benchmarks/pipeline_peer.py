"""transformers' own pipeline mode: a process per stage, one request, greedy; the first rank prints its times as JSON.

Run: torchrun --nproc-per-node 2 -m benchmarks.pipeline_peer FOLDER PROMPT_TOKENS NEW_TOKENS
"""

import json
import sys
import time
from itertools import pairwise
from statistics import median

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main(folder: str, prompt_tokens: int, new_tokens: int) -> None:
    """Print the seconds to the first token and the median seconds of a step, after a run that does not count."""
    torch.set_num_threads(1)
    world = DistributedConfig(pp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", distributed_config=world).eval()
    ids = torch.randint(3, 1000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    times: list[float] = []

    def note(input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)

    for _ in range(2):
        times[:] = [time.perf_counter()]
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[note],
        )
    seconds = [b - a for a, b in pairwise(times)]
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"first": seconds[0], "step": median(seconds[1:]) if new_tokens > 1 else None}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
