"""The decode kernels: `kernels.c`, loaded with ctypes, called with raw pointers.

Nothing of torch is compiled in, so the build takes seconds and one library serves every shape and dtype.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from plans.native import building
from plans.native.building import Source, Unavailable

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Dtypes of weights and cache -> their number in `kernels.c`."""

MAX_ROWS = 16
"""Rows (new tokens of all sequences together) that one call takes."""

MAX_HEAD_DIM = 256

MANY_ROWS = 512
"""Rows of prompts that one call takes: what it needs as scratch space does not grow with the prompt."""

PRODUCT_COUNTERS, READING_COUNTERS = 24, 80
"""Numbers by which the threads of a call share its work: 8 for each of its phases and for who has left."""

_FOLDER = Path(__file__).parent
SOURCE = Source(
    "kernels",
    "decode kernels",
    _FOLDER / "kernels.c",
    headers=tuple(_FOLDER / name for name in ("packed.h", "tiles.h", "many.h", "reading.h", "products.h")),
)
_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


class _OpenMP(ctypes.Structure):
    _fields_ = (
        ("parallel", _Pointer),
        ("thread_number", _Pointer),
        ("num_threads", _Pointer),
    )


class Shape(ctypes.Structure):
    """Sizes and constants that all layers of a model share."""

    _fields_ = (
        *((name, _Int) for name in ("dtype", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        ("intermediate_size", _Int),
        *((name, ctypes.c_double) for name in ("norm_eps", "attention_scale", "residual_multiplier")),
    )


class Linear(ctypes.Structure):
    """Addresses of a linear layer's weights, scales and bias; `bits` 0: plain weights in the model's dtype."""

    _fields_ = (
        *((name, _Pointer) for name in ("weight", "scale", "bias")),
        *((name, _Int) for name in ("bits", "group")),
    )


class Layer(ctypes.Structure):
    """Addresses of one layer's weights, norms and cache; 0 where a family has no such tensor."""

    _fields_ = (
        *((name, _Pointer) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Pointer) for name in ("keys", "values")),
        ("window", _Int),
        ("has_rope", _Int),
    )


class Piece(ctypes.Structure):
    """Rows that follow each other in one sequence of the cache."""

    _fields_ = tuple((name, _Int) for name in ("sequence", "first_row", "num_rows", "past", "start"))


class Step(ctypes.Structure):
    """One decode step of a run of layers."""

    _fields_ = (
        ("openmp", _Pointer),
        *((name, _Int) for name in ("threads", "num_layers", "rows", "num_pieces", "capacity")),
        *((name, _Pointer) for name in ("inputs", "outputs", "cos", "sin", "pieces", "workspace", "counters")),
    )


class Head(ctypes.Structure):
    """Final norm and logits of some rows."""

    _fields_ = (
        ("openmp", _Pointer),
        *((name, _Int) for name in ("threads", "dtype", "rows", "hidden_size", "vocab_size")),
        ("norm_eps", ctypes.c_double),
        ("logits_scaling", ctypes.c_double),
        *((name, _Pointer) for name in ("inputs", "norm")),
        ("weight", Linear),
        *((name, _Pointer) for name in ("logits", "workspace", "counters")),
    )


class Reading(ctypes.Structure):
    """Many rows on their way from one layer's attention to the next one's; `layer` is finished and `next` begun."""

    _fields_ = (
        ("openmp", _Pointer),
        *((name, _Int) for name in ("threads", "rows", "num_pieces", "capacity")),
        *((name, _Pointer) for name in ("shape", "layer", "next", "hidden", "attended", "qkv", "cos", "sin")),
        *((name, _Pointer) for name in ("pieces", "workspace", "counters")),
    )


class Product(ctypes.Structure):
    """One linear layer, its activations and its `result` [R, O]."""

    _fields_ = (
        ("openmp", _Pointer),
        *((name, _Int) for name in ("threads", "dtype", "rows", "columns", "outputs")),
        ("inputs", _Pointer),
        ("weight", Linear),
        *((name, _Pointer) for name in ("result", "workspace", "counters")),
    )


class _Scan(ctypes.Structure):
    _fields_ = (
        ("openmp", _Pointer),
        *((name, _Int) for name in ("threads", "num_spans")),
        *((name, _Pointer) for name in ("spans", "sizes", "counter")),
        ("checksum", _Int),
    )


class Library:
    """The loaded kernels. Calls release the GIL and use the OpenMP threads that torch already runs.

    Attributes:
        path: the file they were loaded from.
        openmp_address: what every call's `openmp` field takes.
    """

    def __init__(self, path: Path) -> None:
        """Load a library built of `SOURCE`.

        Raises:
            OSError: it cannot be loaded on this machine, or torch brings no OpenMP runtime.
        """
        self.path = path.resolve()  # a bare name would be searched for elsewhere
        self._functions = ctypes.CDLL(str(self.path))
        self._functions.workspace_floats.restype = _Int
        self._functions.workspace_floats.argtypes = (ctypes.POINTER(Shape), _Int, _Int)
        self._functions.num_counters.restype = _Int
        self._functions.num_counters.argtypes = (ctypes.POINTER(Shape), _Int, _Int)
        self._functions.reading_floats.restype = _Int
        self._functions.reading_floats.argtypes = (ctypes.POINTER(Shape), _Int, _Int)
        self._functions.product_floats.restype = _Int
        self._openmp = _torch_openmp()
        self.openmp_address = ctypes.addressof(self._openmp)
        self._functions.look_at_processor()

    def workspace_floats(self, shape: Shape, *, rows: int, threads: int) -> int:
        """Return how many fp32 numbers a call needs as scratch space."""
        return int(self._functions.workspace_floats(ctypes.byref(shape), rows, threads))

    def num_counters(self, shape: Shape, *, num_layers: int, vocab_size: int) -> int:
        """Return how many int64 numbers calls need to share their work."""
        return int(self._functions.num_counters(ctypes.byref(shape), num_layers, vocab_size))

    def decode_layers(self, shape: Shape, layers: "ctypes.Array[Layer]", step: Step) -> None:
        """Run one decode step of `layers`."""
        self._functions.decode_layers(ctypes.byref(shape), layers, ctypes.byref(step))

    def compute_logits(self, head: Head) -> None:
        """Run the final norm and the output projection."""
        self._functions.compute_logits(ctypes.byref(head))

    def reading_floats(self, shape: Shape, *, rows: int, threads: int) -> int:
        """Return how many fp32 numbers `read_rows` needs as scratch space."""
        return int(self._functions.reading_floats(ctypes.byref(shape), rows, threads))

    def read_rows(self, reading: Reading) -> None:
        """Finish a layer and begin the next one, for many rows."""
        self._functions.read_rows(ctypes.byref(reading))

    def multiply_linear(self, product: Product) -> None:
        """Multiply activations with a linear layer."""
        floats = self._functions.product_floats(ctypes.byref(product))
        workspace, counters = torch.empty(floats, dtype=torch.float32), torch.empty(PRODUCT_COUNTERS, dtype=torch.int64)
        product.workspace, product.counters = workspace.data_ptr(), counters.data_ptr()
        self._functions.multiply_linear(ctypes.byref(product))

    def read_memory(self, tensors: Sequence[torch.Tensor], *, threads: int) -> int:
        """Read every byte of contiguous `tensors` once and return how many there were: the machine's limit to time."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        spans = (_Pointer * len(sizes))(*(tensor.data_ptr() for tensor in tensors))
        counter = _Int(0)
        scan = _Scan(
            openmp=self.openmp_address,
            threads=threads,
            num_spans=len(sizes),
            spans=ctypes.addressof(spans),
            sizes=ctypes.addressof(lengths := (_Int * len(sizes))(*sizes)),
            counter=ctypes.addressof(counter),
        )
        self._functions.read_memory(ctypes.byref(scan))
        del lengths
        return sum(sizes)


def load(*, on_build: Callable[[str], None] | None = None) -> Library | Unavailable:
    """Return this machine's kernels, compiling them first where the cache folder has none that fit.

    Args:
        on_build: told, in one line, that a compilation starts.

    Example:
        >>> kernels = load()
        >>> isinstance(kernels, Library) or bool(kernels.reason)
        True
    """
    return building.load(SOURCE, Library, on_build=on_build)


def _torch_openmp() -> _OpenMP:
    """Return the entry points of the OpenMP runtime that torch itself is linked to.

    A second runtime would bring a second pool of threads, and two pools spin against each other. A symbol looked up
    in torch's extension module is searched for in the libraries that module loaded.
    """
    try:
        loaded = ctypes.CDLL(torch._C.__file__)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        return _OpenMP(*(ctypes.cast(getattr(loaded, name), _Pointer) for name in names))
    except AttributeError as error:
        raise OSError(f"torch brings no OpenMP runtime with a GNU interface ({error})") from None
