"""The model card of the test checkpoint, written from recorded facts."""

from collections.abc import Mapping, Sequence

FRONT_MATTER = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags:
  - llama
  - python
  - test-checkpoint
---
"""

TEXT = """\
# python-llama

A Llama with {num_parameters:,} parameters that has read the Python standard library. It exists so that a partition
planner, an exporter and a runtime can be tried and tested on a real checkpoint without a download: the layout is
that of a large Llama (several safetensors shards with an index, grouped-query attention, an untied head, bfloat16, a
byte-level BPE tokenizer with a chat template), the size is not.

## Model

| | |
|---|---|
| architecture | `LlamaForCausalLM`, {num_hidden_layers} decoder layers |
| hidden size / feed-forward size | {hidden_size} / {intermediate_size} |
| query heads / key-value heads / head dimension | {num_attention_heads} / {num_key_value_heads} / {head_dim} |
| vocabulary | {vocab_size} (all 256 bytes, so any text can be written) |
| positions | {max_position_embeddings}, all of them trained, the last 400 on few windows only |
| weights | bfloat16, head not tied to the embedding |

## Training

| | |
|---|---|
| text | CPython {python_version}: {num_train_documents} documents, {train_bytes:,} bytes |
| dialogues | {num_dialogues}, made from the docstrings of those documents |
| held out | {num_held_out_documents} documents, {held_out_bytes:,} bytes, {held_out_tokens:,} tokens |
| sha256 of the text | `{corpus_sha256}` |
| seed | {seed} |
| steps | {steps:,}{unfinished} |
| tokens seen | {tokens_seen:,} ({epochs:.2f} epochs of {epoch_tokens:,}) |
| optimizer | Muon for the layers' matrices, AdamW for the rest; warmup and cosine; float32, rounded at the end |
| training loss | {train_loss:.4f} per token (mean of the last 50 steps) |
{held_out_rows}

The losses on held-out text are those of the bfloat16 weights in this folder.
`tests/checkpoint/train.py` made the checkpoint and this page; the same Python version gives the same text.

## Use

For tests, demos and teaching. It writes text that looks like Python, not programs that work, and its answers in a
chat imitate docstrings without knowing much. The text names the authors of the standard library, so the model may too.
Don't use it where a true answer matters.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("tests/checkpoint/python-llama")
model = AutoModelForCausalLM.from_pretrained("tests/checkpoint/python-llama")
inputs = tokenizer("import os\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

## Samples

Not chosen: seed 0, the settings of `generation_config.json`, 120 new tokens.

{samples}
## Licence

The weights, the tokenizer and this page: Apache-2.0.

The text they were trained on: the source files of CPython's standard library without its tests, and the topics of
`pydoc`, under the Python Software Foundation License Version 2 (PSF-2.0). Parts of the standard library carry further
permissive notices of their own; CPython lists them in its documentation under "Licenses and Acknowledgements for
Incorporated Software". Code examples in the documentation are also under the Zero-Clause BSD License. None of the text
is in this folder.
"""

HELD_OUT_ROW = (
    "| held-out loss, {context} tokens of context | {loss:.4f} per token, {bits_per_byte:.4f} bits per byte |"
)


def render(facts: Mapping[str, object], samples: Sequence[tuple[str, str]]) -> str:
    """Write the card; `samples` are pairs of prompt and continuation."""
    is_finished = facts["steps"] == facts["planned_steps"]
    return FRONT_MATTER + TEXT.format(
        **facts["config"].to_dict() | facts,
        epochs=facts["tokens_seen"] / facts["epoch_tokens"],
        unfinished="" if is_finished else f" of {facts['planned_steps']:,}: a snapshot of an unfinished run",
        held_out_rows="\n".join(HELD_OUT_ROW.format(**row) for row in facts["held_out"]),
        samples="".join(sample_block(prompt, text) for prompt, text in samples),
    )


def sample_block(prompt: str, text: str) -> str:
    """Show a prompt and what followed as one block of code."""
    return f"After `{prompt!r}`:\n\n````text\n{prompt}{text.rstrip()}\n````\n\n"
