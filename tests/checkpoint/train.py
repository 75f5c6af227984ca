"""Train the checkpoint that the tests and the demo run on: a small Llama that has read the Python standard library.

    python tests/checkpoint/train.py --out tests/checkpoint/python-llama

One CPU thread, about 50 minutes when the core is free. The seed fixes everything; the corpus is that of the Python
that runs this script.
"""

import argparse
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import card
import corpus
import torch
import torch.nn.functional as F  # noqa: N812
from muon import Muon
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import END_OF_TURN, train_tokenizer

# Shapes: B windows in a batch, S tokens in a window, V vocabulary.
TOKENS_PER_STEP = 4096
EVALUATIONS = 4
MATRIX_LR, VECTOR_LR = 0.02, 0.01
WARMUP_FRACTION, FINAL_LR_FRACTION = 0.03, 0.01
# Short windows first, as they are cheapest; long ones last, so that every position the model offers was trained.
PHASES = ((256, 0.82), (512, 0.12), (1024, 0.06))
CONTEXT, LONG_CONTEXT = 256, 1024
SHARD_SIZE = "2MB"
PROMPTS = ("class ", "import os\n", "def __init__(self, ")
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


@dataclass(slots=True)
class Data:
    """Tokens of whole documents, each between BOS and EOS."""

    train: list[torch.Tensor]
    dialogues: list[torch.Tensor]
    held_out: torch.Tensor
    held_out_bytes: int
    facts: dict[str, object]


@dataclass(slots=True)
class Progress:
    """What the loop has seen so far."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


def main() -> None:
    """Read the corpus, train, and write the checkpoint with its model card."""
    args = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    documents = corpus.read_documents()
    tokenizer = train_tokenizer(
        [document.text for document in documents if not document.is_held_out],
        vocab_size=2048,
        max_position_embeddings=LONG_CONTEXT,
    )
    data = tokenize(documents, tokenizer)
    model = LlamaForCausalLM(model_config(tokenizer))
    model.generation_config = generation_config(tokenizer)
    for progress in train(model, data, num_steps=args.steps, seed=args.seed, bos_token_id=tokenizer.bos_token_id):
        known = facts(model, data, progress, args)
        report(known, progress)
        if args.snapshot:
            write_checkpoint(model, tokenizer, args.snapshot, known)
    write_checkpoint(model, tokenizer, args.out, known)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the checkpoint")
    parser.add_argument("--steps", type=int, default=1100, help=f"optimizer steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--snapshot", type=Path, help="folder that receives a checkpoint at every evaluation")
    return parser.parse_args()


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Describe the model: deep for its size, so that there is something to cut, with three query heads to a KV head."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LONG_CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Sample by default, and stop at the end of a document as well as of a chat turn."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)],
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenize(documents: list[corpus.Document], tokenizer: PreTrainedTokenizerFast) -> Data:
    """Turn the corpus into tokens; held-out documents give no dialogues either."""
    learned = [document for document in documents if not document.is_held_out]
    held_out = [document for document in documents if document.is_held_out]
    chats = [
        tokenizer.apply_chat_template(messages, tokenize=False)
        for document in learned
        for messages in corpus.dialogues(document)
    ]
    return Data(
        train=[encode(tokenizer, corpus.pieces(document)) for document in learned],
        dialogues=[encode(tokenizer, [chat.removeprefix(tokenizer.bos_token)]) for chat in chats],
        held_out=torch.cat([encode(tokenizer, [document.text]) for document in held_out]),
        held_out_bytes=sum(len(document.text.encode()) for document in held_out),
        facts={
            "num_train_documents": len(learned),
            "num_held_out_documents": len(held_out),
            "num_dialogues": len(chats),
            "train_bytes": sum(len(document.text.encode()) for document in learned),
            "corpus_sha256": corpus.digest(documents),
        },
    )


def encode(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> torch.Tensor:
    """Tokenize the pieces of one document and put the whole between BOS and EOS."""
    ids = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([tokenizer.bos_token_id, *chain.from_iterable(ids), tokenizer.eos_token_id])


def train(model: LlamaForCausalLM, data: Data, *, num_steps: int, seed: int, bos_token_id: int) -> Iterator[Progress]:
    """Run the training loop, stopping for the caller after every quarter of the way."""
    optimizers = build_optimizers(model)
    progress = Progress()
    for inputs, targets in batches(data, num_steps=num_steps, seed=seed, bos_token_id=bos_token_id):
        set_learning_rate(optimizers, progress.step / num_steps)
        progress.losses.append(train_step(model, optimizers, inputs, targets))
        progress.step += 1
        if progress.step % max(1, num_steps // EVALUATIONS) == 0 or progress.step == num_steps:
            yield progress


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Give the matrices of the layers to Muon, and the embedding, the head and the norms to AdamW."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizers = [
        Muon(matrices, lr=MATRIX_LR, weight_decay=0.05),
        torch.optim.AdamW(groups, lr=VECTOR_LR, betas=(0.9, 0.95), fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], done: float) -> None:
    """Follow a linear warmup and a cosine to nearly nothing; `done` is the fraction of steps behind us."""
    warm = min(1.0, (done + 1e-3) / WARMUP_FRACTION)
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    scale = warm * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * cosine)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    inputs: torch.Tensor,  # [B, S]
    targets: torch.Tensor,  # [B, S]
) -> float:
    """Take one optimizer step and return the loss before it."""
    loss = next_token_loss(model, inputs, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def next_token_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits  # [B, S, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def batches(data: Data, *, num_steps: int, seed: int, bos_token_id: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `num_steps` batches of equally many tokens, phase by phase."""
    generator = torch.Generator().manual_seed(seed)
    stream = shuffled_epochs(data, num_steps * TOKENS_PER_STEP + 1, generator)
    start = 0
    for phase, (length, _) in enumerate(PHASES):
        until = round(sum(share for _, share in PHASES[: phase + 1]) * num_steps) * TOKENS_PER_STEP
        inputs, targets = windows(stream[start : until + 1], length, bos_token_id)
        order = torch.randperm(len(inputs), generator=generator)  # neighbours in a batch should be strangers
        for rows in order.view(-1, TOKENS_PER_STEP // length):
            yield inputs[rows], targets[rows]
        start = until


def shuffled_epochs(data: Data, num_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Lay the documents end to end, newly shuffled in each epoch, until there are `num_tokens`."""
    documents = [*data.train, *data.dialogues]
    parts: list[torch.Tensor] = []
    missing = num_tokens
    while missing > 0:
        epoch = torch.cat([documents[i] for i in torch.randperm(len(documents), generator=generator).tolist()])
        parts.append(epoch[:missing])
        missing -= len(epoch)
    return torch.cat(parts)


def windows(stream: torch.Tensor, length: int, bos_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a stream into inputs and next-token targets, both [windows, length].

    Every window opens with BOS, so that BOS means "what came before is unknown" and a prompt may start anywhere.
    """
    num_windows = (len(stream) - 1) // length
    inputs = stream[: num_windows * length].view(num_windows, length).clone()
    inputs[:, 0] = bos_token_id
    return inputs, stream[1 : num_windows * length + 1].view(num_windows, length)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, data: Data, length: int) -> float:
    """Average the loss over the held-out documents, read in windows of `length` tokens."""
    inputs, targets = windows(data.held_out, length, model.config.bos_token_id)
    rows = TOKENS_PER_STEP // length
    pairs = zip(inputs.split(rows), targets.split(rows), strict=True)
    total = sum(next_token_loss(model, x, y).item() * x.numel() for x, y in pairs)
    return total / inputs.numel()


def report(known: dict[str, object], progress: Progress) -> None:
    """Say on stderr how far the run is."""
    seconds = time.monotonic() - progress.started
    losses = "  ".join(f"held out at {row['context']}: {row['loss']:.4f}" for row in known["held_out"])
    print(
        f"step {known['steps']}/{known['planned_steps']}  train: {known['train_loss']:.4f}  {losses}"
        f"  {known['tokens_seen'] / seconds:,.0f} tokens/s  {seconds / 60:.1f} min",
        file=sys.stderr,
        flush=True,
    )


def recent_loss(progress: Progress) -> float:
    recent = progress.losses[-50:]
    return sum(recent) / len(recent)


def facts(model: LlamaForCausalLM, data: Data, progress: Progress, args: argparse.Namespace) -> dict[str, object]:
    """Gather what the model card states; losses on held-out text are those of the bfloat16 weights that are saved."""
    saved = rounded(model)
    losses = {length: held_out_loss(saved, data, length) for length in (CONTEXT, LONG_CONTEXT)}
    tokens_per_byte = len(data.held_out) / data.held_out_bytes
    return data.facts | {
        "python_version": platform.python_version(),
        "seed": args.seed,
        "steps": progress.step,
        "planned_steps": args.steps,
        "tokens_seen": progress.step * TOKENS_PER_STEP,
        "epoch_tokens": sum(map(len, data.train)) + sum(map(len, data.dialogues)),
        "held_out_tokens": len(data.held_out),
        "held_out_bytes": data.held_out_bytes,
        "train_loss": recent_loss(progress),
        "held_out": [
            {"context": length, "loss": loss, "bits_per_byte": loss / math.log(2) * tokens_per_byte}
            for length, loss in losses.items()
        ],
        "num_parameters": model.num_parameters(),
        "config": model.config,
    }


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy the model with its weights rounded to bfloat16 but kept in float32, which computes faster on most CPUs."""
    copy = LlamaForCausalLM(model.config).eval()
    copy.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    copy.generation_config = model.generation_config
    return copy


def write_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, known: dict[str, object]
) -> None:
    """Write the checkpoint beside `folder` first, so that a reader never meets half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        fresh = Path(name) / folder.name
        saved = rounded(model)
        chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
        prompts = [*PROMPTS, chat.removeprefix(tokenizer.bos_token)]  # the tokenizer adds its own BOS
        samples = [(prompt, continuation(saved, tokenizer, prompt)) for prompt in prompts]
        saved.bfloat16().save_pretrained(fresh, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card.render(known, samples), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Sample 120 tokens after `prompt` with the checkpoint's own generation settings."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = model.generate(**inputs, max_new_tokens=120)
    return tokenizer.decode(output[0, inputs.input_ids.size(1) :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
