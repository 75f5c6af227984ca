"""Runs in an environment with llama_cpp and gguf (and nothing of ours): conversion to GGUF, and steps on request.

python peer_worker.py convert CHECKPOINT FILE.gguf
python peer_worker.py serve FILE.gguf THREADS      requests and answers as JSON lines
"""

import ctypes
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPARE_SLOTS = 128


def convert(folder: Path, target: Path) -> None:
    """Write a Llama checkpoint as GGUF: matrices in their own dtype, norms in fp32."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(str(target), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for file in sorted(folder.glob("*.safetensors")):
        for name, dtype, shape, data in _tensors(file):
            words = np.frombuffer(data, dtype=np.uint16 if dtype == "BF16" else np.float32).reshape(shape)
            count = heads if ".q_proj." in name else kv_heads if ".k_proj." in name else 0
            if count:  # GGUF turns neighbouring values of a head, Hugging Face its two halves
                words = words.reshape(count, 2, shape[0] // count // 2, shape[1]).swapaxes(1, 2).reshape(shape)
            if len(shape) == 1:
                values = (words.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else words
                writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
            elif dtype == "BF16":
                raw = np.ascontiguousarray(words).view(np.uint8)
                writer.add_tensor(_gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(_gguf_name(name), np.ascontiguousarray(words))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(file: Path) -> Any:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, entry["dtype"], entry["shape"], memoryview(data)[begin:end]


def _gguf_name(name: str) -> str:
    plain = name.removesuffix(".weight")
    if not plain.startswith("model.layers."):
        return f"{GGUF_NAMES[plain]}.weight"
    _, _, index, part = plain.split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[part]}.weight"


class Server:
    """A model with its context; sequences are decoded together."""

    def __init__(self, model: str, threads: int, ids: list[list[int]]) -> None:
        import llama_cpp as api

        self._api, self._ids = api, ids
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx = len(ids) * (len(ids[0]) + SPARE_SLOTS)
        settings.n_seq_max = len(ids)
        settings.n_batch = settings.n_ubatch = max(512, len(ids) * len(ids[0]))
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._newest: list[int] = []
        self._length = 0

    def prefill(self) -> None:
        """Read the prompts, and choose one token each."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)  # noqa: FBT003
        self._length = 0
        self._newest = self._run(self._ids)

    def decode(self, count: int) -> list[float]:
        """Make tokens; return the seconds of each step."""
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self._newest = self._run([[token] for token in self._newest])
            seconds.append(time.perf_counter() - started)
        return seconds

    def _run(self, rows: list[list[int]]) -> list[int]:
        import numpy as np

        new = len(rows[0])
        batch = self._api.llama_batch_init(len(rows) * new, 0, 1)
        batch.n_tokens = len(rows) * new
        lasts = []
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row):
                place = sequence * new + position
                batch.token[place], batch.pos[place] = token, self._length + position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = position == new - 1
            lasts.append(sequence * new + new - 1)
        assert self._api.llama_decode(self._context, batch) == 0
        best = []
        for last in lasts:
            logits = self._api.llama_get_logits_ith(self._context, last)
            row = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
            best.append(int(row.argmax()))
        self._api.llama_batch_free(batch)
        self._length += new
        return best


def serve(model: str, threads: int) -> None:
    """Answer requests, one a line, until there are no more."""
    server: Server | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        if server is None:
            server = Server(model, threads, request["ids"])
        elif request["do"] == "prefill":
            server.prefill()
        else:
            answer = server.decode(request["count"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(sys.argv[2], int(sys.argv[3]))
