"""What `export.py` can be told. No torch here: --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ImportSettings:
    """export.py import: make a model from elsewhere an ordinary checkpoint."""

    source: str = ""
    """Hugging Face folder, GGUF file, or Hub name (owner/name, also owner/name@revision)."""
    out: str = ""
    """The checkpoint to write (.pt)."""
    overwrite: bool = False
    """Replace a file that is there."""


@dataclass
class HuggingFaceSettings:
    """export.py hf: make a checkpoint a folder that transformers loads."""

    checkpoint: str = ""
    """The model to export: a checkpoint (.pt), or whatever else opens."""
    out: str = ""
    """The folder to write; it must not hold anything yet."""
    max_shard_gb: float = 4.0
    """Largest weights file in GB; larger models are split, with an index."""


@dataclass
class GgufSettings:
    """export.py gguf: make a checkpoint a file that llama.cpp loads."""

    checkpoint: str = ""
    """The model to export: a checkpoint (.pt), or whatever else opens."""
    out: str = ""
    """The file to write (.gguf)."""
    dtype: Literal["f32", "f16", "q8_0"] = "f16"
    """How matrices are stored; norms and biases stay f32."""
    overwrite: bool = False
    """Replace a file that is there."""


@dataclass
class CompactSettings:
    """export.py compact: make a pruned checkpoint smaller by its zeros; it opens like any other."""

    checkpoint: str = ""
    """The pruned model: a checkpoint (.pt) with masks."""
    out: str = ""
    """The checkpoint to write (.pt)."""
    dtype: Literal["f32", "f16", "bf16"] = "f32"
    """How matrices are stored; f32 gives back the very same model."""
    overwrite: bool = False
    """Replace a file that is there."""


@dataclass
class PeftSettings:
    """export.py peft: make a LoRA adapter or a prefix a folder that PEFT loads."""

    adapter: str = ""
    """The adapter to export (.pt)."""
    out: str = ""
    """The folder to write; it must not hold anything yet."""


@dataclass
class MergeSettings:
    """export.py merge: put a LoRA adapter into the weights of its base."""

    adapter: str = ""
    """The adapter to merge: a checkpoint (.pt), or a folder of PEFT's."""
    out: str = ""
    """The checkpoint to write (.pt)."""
    base_model: str | None = None
    """The adapter's base, where it is not where the adapter says."""
    overwrite: bool = False
    """Replace a file that is there."""
