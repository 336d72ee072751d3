"""llama.cpp through its C interface (llama.h): the library is in the wheel ``xllamacpp``, so nothing is compiled.

The wheel's own Python interface takes text. A picture is embeddings, which the C interface takes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import weakref
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np

WHEEL = "xllamacpp"
CHUNK = 128  # maximum number of tokens in one pass
FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED; without it, values would be stored transposed, slow to copy
F16 = 1  # GGML_TYPE_F16, the keys and values
CPU_FEATURES = {"avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi2": "bmi2", "avx512": "avx512f"}
DEFAULTS = {  # of llama_context_params, to recognize its layout
    "n_ctx": 512,
    "n_batch": 2048,
    "n_threads": 4,
    "n_threads_batch": 4,
    "flash_attn_type": -1,
    "type_k": F16,
    "type_v": F16,
    "offload_kqv": True,
    "kv_unified": False,
}
ALL = -1  # as the end of a range of positions


class _ModelParameters(ctypes.Structure):
    """llama_model_params, left at their defaults; larger than any version has them."""

    _fields_ = [("opaque", c_uint8 * 256)]


class _ContextParameters(ctypes.Structure):
    """llama_context_params as far as they are set here; larger than any version has them."""

    _fields_ = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((name, c_uint32) for name in ("n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int32) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", c_int32),
        ("rope", c_float * 8),
        ("evaluation_callback", c_void_p * 2),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("abort_callback", c_void_p * 2),
        ("other", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("opaque", c_uint8 * 128),
    ]


class _Batch(ctypes.Structure):
    """llama_batch: the number of tokens, and the addresses of arrays with one number, or embedding, for each."""

    _fields_ = [
        ("n_tokens", c_int32),
        *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    ]


class _Tokens:
    """What llama_batch says of the tokens of a pass, in arrays that every pass of a context uses again."""

    def __init__(self) -> None:
        self.positions, self.sequences, one_each = (np.ones(CHUNK, dtype=np.int32) for _ in range(3))
        self.is_output = np.zeros(CHUNK, dtype=np.int8)
        addresses = self.sequences.ctypes.data + self.sequences.itemsize * np.arange(CHUNK, dtype=np.uintp)
        self._arrays = (self.positions, one_each, addresses, self.is_output)  # llama.cpp has only their addresses
        self._pointers = [array.ctypes.data for array in self._arrays]

    def batch(self, inputs: np.ndarray) -> _Batch:
        """The argument of llama_decode, for token ids or embeddings, which must stay until it returns."""
        address = inputs.ctypes.data
        token_ids, embeddings = (address, None) if inputs.ndim == 1 else (None, address)
        return _Batch(len(inputs), token_ids, embeddings, *self._pointers)


_SIGNATURES = {
    "llama_model_default_params": (_ModelParameters, []),
    "llama_context_default_params": (_ContextParameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParameters]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParameters]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (c_void_p, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_state_seq_get_size": (c_size_t, [c_void_p, c_int32]),
    "llama_state_seq_get_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_state_seq_set_data": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32]),
    "llama_log_set": (None, [c_void_p, c_void_p]),
}


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _discard(level: int, text: bytes, _: None) -> None:
    """llama.cpp's log; what went wrong is told by the results."""


@cache
def load_library() -> ctypes.CDLL:
    """The library of llama.cpp, loaded and checked once.

    Raises:
        OSError: the wheel is not installed, its C interface is hidden or another one, or the processor is too old.
    """
    package = importlib.util.find_spec(WHEEL)
    files = sorted(Path(package.origin).parent.glob(f"{WHEEL}*.so")) if package and package.origin else []
    if not files:
        raise OSError(f"{WHEEL} is not installed, or has no library for this system")
    library = ctypes.CDLL(str(files[0]))  # needs libgomp; PyTorch has one and is imported before
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise OSError(f"{WHEEL} does not export llama.cpp's C interface here") from error
    _check(library)
    library.llama_log_set(_discard, None)
    return library


def _check(library: ctypes.CDLL) -> None:
    """Checks that the processor has the library's instructions, and that its structures have the layout above."""
    cpu_info = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and cpu_info.exists():
        flags = set(next(line for line in cpu_info.read_text().splitlines() if line.startswith("flags")).split())
        missing = [
            flag for name, flag in CPU_FEATURES.items() if library[f"ggml_cpu_has_{name}"]() and flag not in flags
        ]
        if missing:
            raise OSError(f"this processor lacks {', '.join(missing)}")
    defaults = library.llama_context_default_params()
    if any(getattr(defaults, name) != value for name, value in DEFAULTS.items()):
        raise OSError(f"this version of {WHEEL} has another interface than mmchat expects")


class LlamaModel:
    """The weights in a GGUF file, memory-mapped.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self._library = load_library()
        self.pointer = self._library.llama_model_load_from_file(
            os.fsencode(path), self._library.llama_model_default_params()
        )
        if not self.pointer:
            raise OSError(f"llama.cpp cannot read {path.name}")
        weakref.finalize(self, self._library.llama_model_free, self.pointer).atexit = False
        self.vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self.pointer))


class Sequences:
    """A context: keys and values of up to ``count`` sequences with ``capacity`` tokens together, and passes on them."""

    def __init__(self, model: LlamaModel, capacity: int, count: int):
        self._library, self._model = load_library(), model
        self.capacity, self.count = capacity, count
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = capacity, count
        parameters.n_batch, parameters.n_ubatch = max(CHUNK, count), CHUNK  # a smaller n_batch would end the process
        parameters.flash_attn_type, parameters.kv_unified, parameters.no_perf = FLASH_ATTENTION, True, True
        self._context = self._library.llama_init_from_model(model.pointer, parameters)
        if not self._context:
            raise MemoryError("llama.cpp cannot make a context: too little memory, or a model that it does not know")
        self._finalizer = weakref.finalize(self, _free, self._library, self._context, model)
        self._finalizer.atexit = False  # a thread may still use it
        self._memory = self._library.llama_get_memory(self._context)
        self._tokens = _Tokens()

    def extend(
        self,
        inputs: np.ndarray,
        positions: Sequence[int],
        sequences: Sequence[int],
        outputs: Sequence[int],
        threads: int,
    ) -> np.ndarray:
        """Appends tokens to their sequences, in one pass.

        Args:
            inputs: token ids, [tokens], int32, or embeddings, [tokens, hidden_size], float32; at most CHUNK tokens.
            positions: of the tokens in their sequences.
            sequences: the sequence of each token.
            outputs: indices of the tokens whose logits are wanted, in ascending order.
            threads: that share the work.

        Returns:
            Logits, [outputs, vocabulary].
        """
        tokens = len(inputs)
        self._tokens.positions[:tokens], self._tokens.sequences[:tokens] = positions, sequences
        self._tokens.is_output[:] = False
        self._tokens.is_output[list(outputs)] = True
        self._library.llama_set_n_threads(self._context, threads, threads)
        if status := self._library.llama_decode(self._context, self._tokens.batch(inputs)):
            raise MemoryError(f"llama.cpp could not compute the next tokens (status {status})")
        logits = np.empty((len(outputs), self._model.vocabulary), dtype=np.float32)
        ctypes.memmove(logits.ctypes.data, self._library.llama_get_logits(self._context), logits.nbytes)
        return logits

    def save(self, sequence: int) -> np.ndarray:
        """A copy of the keys and values of a sequence, as bytes."""
        state = np.empty(self._library.llama_state_seq_get_size(self._context, sequence), dtype=np.uint8)
        self._library.llama_state_seq_get_data(self._context, state.ctypes.data, state.nbytes, sequence)
        return state

    def restore(self, sequence: int, state: np.ndarray, length: int) -> None:
        """Makes an empty sequence of the first tokens of a saved one."""
        if not self._library.llama_state_seq_set_data(self._context, state.ctypes.data, state.nbytes, sequence):
            raise MemoryError("llama.cpp has no room for another sequence")
        self.clear(sequence, length)

    def copy(self, source: int, target: int) -> None:
        """Copies a sequence into an empty one; the tokens that they share take room once."""
        self._library.llama_memory_seq_cp(self._memory, source, target, 0, ALL)

    def clear(self, sequence: int, start: int = 0) -> None:
        """Removes the tokens of a sequence from this position on."""
        if self._finalizer.alive:  # garbage collection may free a context before it closes the answers in it
            self._library.llama_memory_seq_rm(self._memory, sequence, start, ALL)


def _free(library: ctypes.CDLL, context: int, _: LlamaModel) -> None:
    """Frees a context. Its model must outlive it, so it is an argument."""
    library.llama_free(context)
