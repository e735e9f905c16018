"""A checkpoint as a GGUF file that llama.cpp loads, read back and compared before it gets its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from data.templates import template_from_spec
from data.tokenizer import Tokenizer, tokenizer_from_spec
from formats.checkpoint import write_durably
from formats.errors import FormatError
from formats.gguf_config import architecture_for, llama3_factors, metadata_for, shortest_float32
from formats.gguf_header import read_gguf_header
from formats.gguf_names import stored_tensors
from formats.gguf_read import import_gguf, read_config, read_weights
from formats.gguf_tokenizer import read_vocabulary
from formats.gguf_vocabulary import vocabulary_metadata
from model.config import GPTConfig, padded_vocab

DTYPES = ("f32", "f16", "q8_0")
_Q8_BLOCK = 32  # values that share a scale
# llama.cpp's general.file_type: what most of the weights are.
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}


def write_gguf(payload: dict[str, Any], path: str | Path, dtype: str = "f32") -> dict[str, Any]:
    """Write a checkpoint's payload with its tokenizer and template; vectors stay f32 in every `dtype`.

    Returns {"largest_difference": of any weight after reading back, "path", "bytes", "notes": [str, ...]}. Memory: the
    payload's and four times its largest tensor. ValueError with the reason where GGUF has no place for the network or
    the tokenizer; what was at `path` then stays.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise ValueError(f"GGUF: dtype {dtype!r} cannot be written, choose one of {', '.join(DTYPES)}")
    if not isinstance(payload.get("tokenizer"), dict):
        raise ValueError("GGUF: the checkpoint holds no tokenizer, without which llama.cpp loads no file")
    tokenizer = tokenizer_from_spec(payload["tokenizer"])
    notes: list[str] = []
    config = _as_stored(GPTConfig.from_dict(payload["config"]))
    config = _fit_vocabulary(config, tokenizer, notes)
    vocabulary, said = vocabulary_metadata(tokenizer, template_from_spec(payload.get("template")))
    export = _Export(config, architecture_for(config), payload["model"], dtype, notes + said)
    largest = 0.0

    def check(temporary: Path) -> None:
        nonlocal largest
        largest = export.compare(temporary, tokenizer)

    write_durably(path, lambda file: export.write(file, path.stem, vocabulary), check)
    return {"largest_difference": largest, "path": str(path), "bytes": path.stat().st_size, "notes": export.notes}


def _as_stored(config: GPTConfig) -> GPTConfig:
    """The config as far as a file can say it: float32 numbers, and nothing of training."""
    eps, theta = shortest_float32(config.norm_eps), shortest_float32(config.rope_theta)
    return dataclasses.replace(config, dropout=0.0, norm_eps=eps, rope_theta=theta)


def _fit_vocabulary(config: GPTConfig, tokenizer: Tokenizer, notes: list[str]) -> GPTConfig:
    """llama.cpp wants as many rows as there are tokens; rows that no token names are left out."""
    known = tokenizer.vocab_size
    if known > config.vocab_size:
        raise ValueError(f"GGUF: the tokenizer has {known:,} ids, the model only {config.vocab_size:,}")
    if known < config.vocab_size:
        notes.append(f"vocabulary of {config.vocab_size:,} cut to the {known:,} ids that the tokenizer has")
    return dataclasses.replace(config, vocab_size=known, padded_vocab_size=padded_vocab(known))


class _Export:
    """One network on its way into one file."""

    def __init__(
        self, config: GPTConfig, architecture: str, weights: dict[str, Tensor], dtype: str, notes: list[str]
    ) -> None:
        self.config, self.architecture, self.weights, self.notes = config, architecture, weights, notes
        self.dtype = dtype
        self.gguf = import_gguf()
        self.layout = stored_tensors(config, architecture)
        self.metadata = metadata_for(config, architecture)
        scaling = config.rope_scaling
        self.factors = None  # (head_dim / 2,)
        if scaling is not None and scaling["rope_type"] == "llama3":
            self.factors = llama3_factors(config, scaling)
        odd = [stored.name for stored in self.layout if len(stored.shape) > 1 and stored.shape[-1] % _Q8_BLOCK]
        if dtype == "q8_0" and odd:
            notes.append(f"{len(odd)} tensors whose rows are no multiple of {_Q8_BLOCK} stay f16, {odd[0]} among them")

    def write(self, file: IO[bytes], name: str, vocabulary: dict[str, Any]) -> None:
        """Everything, one tensor at a time."""
        writer = self.gguf.GGUFWriter(file.name, self.architecture)
        try:
            writer.add_name(name)
            writer.add_file_type(_FILE_TYPES[self.dtype])
            if self.dtype == "q8_0":
                writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
            for key, value in self.metadata.items():
                _add(writer, f"{self.architecture}.{key}", value)
            for key, value in vocabulary.items():
                _add(writer, key, value)
            for stored in self.layout:
                self._announce(writer, stored.name, stored.shape)
            if self.factors is not None:
                self._announce(writer, "rope_freqs.weight", tuple(self.factors.shape))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for stored in self.layout:
                self._append(writer, stored.shape, stored.assemble(self.weights))
            if self.factors is not None:
                self._append(writer, tuple(self.factors.shape), self.factors)
        finally:
            writer.close()

    def _kind(self, shape: tuple[int, ...]) -> Any:
        """The type of a stored tensor of this shape."""
        kinds = self.gguf.GGMLQuantizationType
        if len(shape) == 1 or self.dtype == "f32":
            return kinds.F32
        return kinds.Q8_0 if self.dtype == "q8_0" and shape[-1] % _Q8_BLOCK == 0 else kinds.F16

    def _announce(self, writer: Any, name: str, shape: tuple[int, ...]) -> None:
        kind = self._kind(shape)
        block, block_bytes = self.gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=kind)

    def _append(self, writer: Any, shape: tuple[int, ...], tensor: Tensor) -> None:
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        with np.errstate(over="ignore"):  # beyond float16's range: the comparison finds it
            writer.write_tensor_data(self.gguf.quants.quantize(values, self._kind(shape)))

    def compare(self, path: Path, tokenizer: Tokenizer) -> float:
        """The largest difference of any weight in the file, read again; FormatError where more than weights differ."""
        header = read_gguf_header(path)
        config, _ = read_config(header)
        if config != self.config:
            raise FormatError(f"GGUF: the network reads back as {config}, but it is {self.config}")
        _compare_tokenizers(tokenizer, read_vocabulary(header)[0])
        largest = 0.0
        for tensors in read_weights(header, config):
            for name, tensor in tensors.items():
                rows = config.vocab_size if name in ("wte.weight", "lm_head.weight") else len(tensor)
                difference = (tensor[:rows] - self.weights[name][:rows].float()).abs().max().item()
                if not difference < float("inf"):
                    raise ValueError(f"GGUF: {name} has values beyond the range of {self.dtype}: write f32")
                largest = max(largest, difference)
        if self.dtype == "f32" and largest:
            raise FormatError(f"GGUF: f32 weights read back with a difference of {largest}")
        return largest


def _compare_tokenizers(ours: Tokenizer, read: Tokenizer) -> None:
    """FormatError unless every id stands for the same bytes, and the special ones for the same roles."""
    differing = [
        name
        for name in ("vocab_size", "eot_id", "bos_id", "special_tokens")
        if getattr(ours, name) != getattr(read, name)
    ]
    if differing:
        name = differing[0]
        raise FormatError(
            f"GGUF: the tokenizer reads back with {name} {getattr(read, name)}, not {getattr(ours, name)}"
        )


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
