"""NaN and infinity: noticed before a token is chosen, and traced to the stage that made them."""

from collections.abc import Sequence

import torch

from plans.errors import NumericalError
from runtime.stages.chain import Chain


class NonFiniteError(NumericalError):
    """The logits of a step are not finite.

    Attributes:
        stage: zero-based index of the first stage whose output is not finite.
        step: 0 for the prompt, k for the k-th token after the first.
    """

    default_code = "E-NONFINITE"

    def __init__(self, chain: Chain, *, stage: int, step: int) -> None:
        self.stage, self.step = stage, step
        spec = chain.stages[stage]
        when = "reading the prompt" if step == 0 else f"step {step}"
        super().__init__(
            f"{when}: NaN or infinity in stage {stage} ({spec.words}) on {spec.device}",
            hint="try --dtype fp32, or check the weights with llamaplan verify",
        )


def find_stage(chain: Chain, token_ids: Sequence[int]) -> int:
    """Compute a sequence again, without a cache, and return the first stage that is not finite at the end."""
    broken = []
    handles = []
    for index in range(len(chain.stages)):

        def check(_module: object, _inputs: object, output: torch.Tensor, stage: int = index) -> None:
            if not torch.isfinite(output[:, -1]).all():
                broken.append(stage)

        handles += [module.register_forward_hook(check) for module in chain.stage_modules(index)]
    try:
        chain(input_ids=torch.tensor([token_ids], device=chain.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else len(chain.stages) - 1
