"""The test checkpoint's tokenizer: byte-level BPE, BOS in front as Llama does it, and a chat template."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0 to 3
END_OF_TURN = "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = [UNK, BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES), END_OF_TURN]

# Llama 3's split, but for numbers, which take a space before them as words do. Runs of spaces stay whole except for
# the last one, which belongs to the word, so indentation is cheap.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('this template knows the roles system, user and assistant, not ' + message['role']) }}
{%- endif %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, max_position_embeddings: int) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts` and wrap them for transformers; special tokens count in `vocab_size`."""
    tokenizer = byte_level_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = bos_in_front(tokenizer.token_to_id(BOS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=SPECIAL_TOKENS[4:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def byte_level_bpe() -> Tokenizer:
    """Build the untrained tokenizer: split, map bytes to letters, merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bos_in_front(bos_token_id: int) -> processors.TemplateProcessing:
    """Put BOS before every sequence when special tokens are asked for."""
    return processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_token_id)]
    )
