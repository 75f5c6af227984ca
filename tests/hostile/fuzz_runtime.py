"""What `llamarun` reads: batch lines, conversations, prompts, tokenizers, generation settings, templates, messages."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from plans.config.config import read_config
from plans.errors import InputError
from runtime.batch.input import Defaults, read_jobs
from runtime.chat.conversation import read_conversation
from runtime.chat.rendering import _answer
from runtime.cli.opening import merge_sampling
from runtime.distributed.control import messages as control
from runtime.distributed.header import NUM_WORDS, STEP, Header, Stamp, pack, unpack
from runtime.generate.limits import Limits
from runtime.generate.sampling import Sampling
from runtime.prepared import Prepared, prepare_session
from runtime.reading.families import parse_model_config
from runtime.reading.opening import open_source
from runtime.reading.tokenizer import encode_prompt, load_tokenizer, read_prompt
from runtime.steps.parts import Drawing, Opening
from tests.hostile.fuzz_files import CONFIGS, KNOWN_KEYS, SHIPPED
from tests.hostile.fuzz_reader import Reader, reader
from tests.hostile.mutations import (
    CONTAINERS,
    NUMBERS,
    STRINGS,
    mutate_bytes,
    mutate_document,
    mutate_lines,
    mutate_text,
)

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "print <|endoftext|> twice"}]
TEMPLATES = (
    (SHIPPED / "chat_template.jinja").read_text(),
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}{% endfor %}{{ 'A' if add_generation_prompt }}",
    "{%- macro s(x) -%}[{{ x }}]{%- endmacro -%}{{ eos_token }}{% for m in messages %}{{ s(m.content) }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n+1 %}{{ loop.index }}{% endfor %}{{ ns.n }}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages | tojson }}",
)
TEMPLATE_PIECES = (
    *("{{", "}}", "{%", "%}", "{#", "#}", "-%}", "{% endif %}", "{% endfor %}", "{% else %}", "{% raw %}", "{{ [] }}"),
    *("{{ messages * 9999 }}", "{{ 1 // 0 }}", "{{ none.x }}", "{{ ''.__class__.__mro__ }}", "{{ self }}", "{{ x() }}"),
    *("{{ range(9999999) }}", "{% for i in range(99999) %}x{% endfor %}", "{{ 'a' * 99999999 }}", "{{ 9 ** 9 }}"),
    *("{{ messages[0].content | int }}", "{{ messages[9] }}", "{{ cycler }}", "{{ '%99999999d' % 1 }}", "{{ 'x'|e }}"),
    *("{% include 'x' %}", "{% import 'x' as y %}", "{% set messages = 1 %}", "{{ strftime_now('%Y') }}", "\ud800"),
    *("{{ messages | map(attribute='role') | join }}", "{% break %}", "{% generation %}", "{{ ('x'*9999)|center(9) }}"),
    *(
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ 1" + "+1" * 3000 + " }}",
        "{% if 1 %}" * 60,
        "{{ [[]]*9999999 }}",
    ),
)
GENERATION: dict[str, Any] = {"eos_token_id": [0, 5], "pad_token_id": 0, "bos_token_id": 1, "do_sample": True}
_GENERATION_NAMES = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id", "pad_token_id", "do_sample"),
    *("max_new_tokens", "max_length", "num_beams", "no_repeat_ngram_size", "suppress_tokens", "stop_strings"),
    *("forced_eos_token_id", "typical_p", "epsilon_cutoff", "eta_cutoff", "sequence_bias", "watermarking_config"),
    *("cache_implementation", "compile_config", "transformers_version", "generation_kwargs", "num_return_sequences"),
)
GENERATION_KEYS = dict.fromkeys(_GENERATION_NAMES, (*NUMBERS, *STRINGS, *CONTAINERS))


def prepared() -> Prepared:
    """The shipped checkpoint, ready for prompts."""
    return prepare_session(open_source(SHIPPED, model=None), device_map={})


@reader
def batch(folder: Path) -> Reader:
    """The lines of `llamarun batch`."""
    model, path = prepared(), folder / "in.jsonl"
    defaults = Defaults(Sampling(), Limits(context_tokens=model.context_tokens, eos_token_ids=model.eos_token_ids))
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "def f(x):", "max_tokens": 4},
        {"id": 7, "messages": MESSAGES, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "seed": 3},
        {"prompt": "x", "stop": ["\n", "end"], "repetition_penalty": 1.1},
    ]
    # A conversation takes a process that renders it, and a second to start it: one of twenty has one.
    talk, plain = ("\n".join(map(json.dumps, some)).encode() + b"\n" for some in (rows, rows[::2]))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        jobs = read_jobs(path, model, defaults, model_id="0")
        assert all(job.num_tokens <= model.context_tokens for job in jobs), "longer than the context"

    return Reader(make=lambda rng: mutate_lines(rng, rng.choices((talk, plain), (1, 19))[0]), read=read)


@reader
def conversation(folder: Path) -> Reader:
    """What `/save` wrote."""
    turns = [*MESSAGES, {"role": "assistant", "content": "\u00e9\n"}]
    seed = json.dumps({"schema_version": 1, "kind": "conversation", "messages": turns}).encode()
    path, again = folder / "saved.json", folder / "again.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = read_conversation(path)
        found.save(again)
        assert read_conversation(again) == found, "reads back as something else"

    return Reader(make=lambda rng: mutate_document(rng, seed), read=read)


@reader
def prompts(folder: Path) -> Reader:
    """A prompt from a file, up to its tokens."""
    tokenizer = load_tokenizer(SHIPPED, vocab_size=2048)
    seed = 'def f(x):\n\treturn "\u00e9<|endoftext|>\U0001f600"\r\n'.encode()

    def read(data: bytes) -> None:
        text = read_prompt(data, where="prompt")
        ids = encode_prompt(tokenizer, text, parses_special=len(data) % 2 == 0)
        assert all(0 <= token < 2048 for token in ids)

    return Reader(make=lambda rng: mutate_bytes(rng, seed), read=read)


@reader
def tokenizer(folder: Path) -> Reader:
    """`tokenizer.json` with a small vocabulary, and `tokenizer_config.json`; what loads must encode."""
    good = {name: (SHIPPED / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    good["tokenizer.json"] = _small_tokenizer(json.loads(good["tokenizer.json"]))
    for name, data in good.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_bytes((SHIPPED / "config.json").read_bytes())

    def read(data: bytes) -> None:
        name, _, changed = data.partition(b"\n")
        path = folder / os.fsdecode(name)
        try:
            path.write_bytes(changed)
            found = load_tokenizer(folder, vocab_size=2048)
            encode_prompt(found, "def f(x):\n", parses_special=False)
        finally:
            path.write_bytes(good[path.name])

    return Reader(make=_one_of(good, weights=(4, 1)), read=read)


@reader
def generation(folder: Path) -> Reader:
    """`generation_config.json`, up to the settings of a run."""
    model = folder / "model"
    shutil.copytree(SHIPPED, model)
    # Every input is read beside the tokenizer: most of the time would go into its merges.
    (model / "tokenizer.json").write_bytes(_small_tokenizer(json.loads((SHIPPED / "tokenizer.json").read_bytes())))
    seeds = [json.dumps(GENERATION).encode(), (SHIPPED / "generation_config.json").read_bytes()]

    def read(data: bytes) -> None:
        (model / "generation_config.json").write_bytes(data)
        found = prepare_session(open_source(model, model=None), device_map={})
        settings = merge_sampling(found, {})
        assert isinstance(settings.temperature, int | float)
        assert isinstance(settings.repetition_penalty, int | float)
        assert isinstance(settings.top_k, int)

    return Reader(make=lambda rng: mutate_document(rng, rng.choice(seeds), known=GENERATION_KEYS), read=read)


@reader
def model_config(folder: Path) -> Reader:
    """`config.json`, as transformers is given it."""
    seeds = [json.dumps(table).encode() for table in CONFIGS]
    known = KNOWN_KEYS | dict.fromkeys(
        ("rms_norm_eps", "rope_theta", "hidden_act", "eos_token_id"), (*NUMBERS, *STRINGS)
    )
    path = folder / "config.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        parse_model_config(read_config(path).raw)

    return Reader(make=lambda rng: mutate_document(rng, rng.choice(seeds), known=known), read=read)


@reader
def templates(folder: Path) -> Reader:
    """Chat templates, and what is said in them, as the process that renders answers; others end that one after 5 s."""
    known = load_tokenizer(SHIPPED, vocab_size=2048)

    def make(rng: Random) -> bytes:
        text, talk = rng.choice(TEMPLATES), json.dumps(MESSAGES)
        if rng.random() < 0.8:
            text = mutate_text(rng, text, pieces=TEMPLATE_PIECES)
        else:
            talk = json.dumps([MESSAGES[0], MESSAGES[1] | {"content": mutate_text(rng, MESSAGES[1]["content"])}])
        return json.dumps([text, talk]).encode()

    def read(data: bytes) -> None:
        text, talk = json.loads(data)
        known.chat_template = text
        answer = _answer(known, json.loads(talk))
        if "ids" not in answer:
            raise InputError(**answer)

    return Reader(make=make, read=read, max_seconds=30.0, max_extra_bytes=1 << 30)


@reader
def control_messages(folder: Path) -> Reader:
    """What driver and workers tell each other."""
    identity = control.Identity(
        protocol=1, version="0", torch="2", byte_order="little", model_id="ab", plan_sha256="c", num_stages=2
    )
    drawing = Drawing(
        temperature=0.5, top_k=1, top_p=1.0, min_p=None, repetition_penalty=1.0, frequency_penalty=0.5,
        presence_penalty=0.0, logit_bias={7: -1.0}, seed=2, sequence_index=0, rules={"typical_p": 0.5}, max_length=9,
        eos_token_ids=(0, 5), num_top=2,
    )  # fmt: skip
    opening = Opening(
        sequence=1, num_prompt_tokens=3, num_tokens=5, slot=0, num_slots=2, capacity=9, drawing=drawing,
        prompt_ids=(1, 2, 3),
    )  # fmt: skip
    good = (
        control.Join(rank=1, host="box", pid=7, identity=identity),
        control.Open(opening=opening),
        control.Put(key="k", value="dg=="),
        control.Failed(exit_code=7, code="E-PEER", line="x"),
        control.Form(epoch=1, uses_nccl=False),
        control.Beat(),
    )
    seeds = [control.encode(message) for message in good]

    def read(data: bytes) -> None:
        message = control.decode(data)
        assert control.decode(control.encode(message)) == message, "reads back as something else"

    return Reader(make=lambda rng: mutate_document(rng, rng.choice(seeds)), read=read)


@reader
def frames(folder: Path) -> Reader:
    """The words before a payload between workers."""
    stamp = Stamp(7, 0)
    good = pack(Header(STEP, 0, 1, 1, 5, 64, 2), stamp)

    def make(rng: Random) -> bytes:
        words = list(good)
        for _ in range(rng.choice((1, 1, 2, 3))):
            words[rng.randrange(len(words))] = rng.choice(
                (0, 1, 2, 3, 4, -1, 2**31, 2**62, -(2**63), rng.getrandbits(40))
            )
        fields = Header(*words[4:-2])
        if rng.random() < 0.7 and fields.dtype in (1, 2, 3, 4):
            words = pack(fields, Stamp(*words[2:4]))  # with the checksum that belongs to it
        return json.dumps(words if rng.random() < 0.95 else words[: rng.randrange(NUM_WORDS)]).encode()

    def read(data: bytes) -> None:
        assert 0 <= unpack(json.loads(data), stamp).payload_bytes <= 1 << 36

    return Reader(make=make, read=read)


def _one_of(good: dict[str, bytes], *, weights: tuple[int, ...]) -> Callable[[Random], bytes]:
    """An input is a file's name, a line feed, and what lies there."""

    def make(rng: Random) -> bytes:
        name = rng.choices(list(good), weights)[0]
        return name.encode() + b"\n" + mutate_document(rng, good[name])

    return make


def _small_tokenizer(document: dict[str, Any]) -> bytes:
    """The same tokenizer without merges, with the tokens of single bytes alone and those that are added."""
    vocab: dict[str, int] = document["model"]["vocab"]
    added = {token["content"] for token in document["added_tokens"]}
    document["model"]["vocab"] = {text: i for text, i in vocab.items() if len(text) == 1 or text in added}
    document["model"]["merges"] = []
    return json.dumps(document).encode()
