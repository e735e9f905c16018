"""What `sample.py` and `evaluate.py` can be told. No torch here: --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass
class SampleSettings:
    """sample.py: let one checkpoint answer, or several side by side."""

    checkpoints: tuple[str, ...] = ()
    """Models: checkpoints (.pt), a run's folder for all of its own, Hugging Face folders, GGUF files, Hub names."""
    every: int = 1
    """Only every Nth of a run's numbered checkpoints, counted back from its last."""
    prompt: tuple[str, ...] = ()
    """Prompts, each in quotes."""
    prompts: str | None = None
    """File of prompts, - for standard input: one a line, or JSON lines with prompt, context, reference (or Dolly's)."""
    base_model: str | None = None
    """Base of the adapters among them, where it is not where the adapters say."""
    chat: bool = False
    """Talk with the one checkpoint in the terminal, in its prompt template, answers as they are written."""
    serve: bool = False
    """A chat page and an OpenAI-compatible API on 127.0.0.1 for one model, or for two side by side."""
    port: int = 8766
    """Port of serve; 0 = any free one."""
    system: str = ""
    """The system message of a chat."""
    prompt_template: str = "auto"
    """A template's name, such as dolly or chatml; none = raw text; auto = the first checkpoint's that has one."""
    weights: Literal["float32", "int8", "sparse"] = "float32"
    """int8: about twice the tokens/s on a CPU, slightly other numbers; sparse: a pruned model without its zeros."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    temperature: float = 0.8
    """Sharpness of sampling: below 1 safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample among the K likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability; 1 = all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were read or written before become less likely; 1 = off."""
    seed: int = 1337
    """Seed of sampling. An answer depends on seed and prompt, not on the other prompts or the batch size."""
    seeds: int = 1
    """Answers to each prompt, each with the next seed."""
    batch_size: int = 1
    """Prompts answered at a time; with 1, answers of a single checkpoint appear as they are written."""
    json: str | None = None
    """Write prompts, answers and figures to this JSON file."""
    html: str | None = None
    """Write a comparison page to this HTML file: self-contained, works without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass
class EvaluateSettings:
    """evaluate.py: measure checkpoints on texts, sets of instructions, multiple choice."""

    # Names of this script's own, beside those of training/aliases.py.
    ALIASES: ClassVar[dict[str, str]] = {
        "text": "input",
        "seq_len": "block_size",
        "model_name_or_path": "checkpoints",
        "eval_batch_size": "batch_size",
        "per_device_eval_batch_size": "batch_size",
        "max_eval_samples": "max_samples",
    }

    checkpoints: tuple[str, ...] = ()
    """Models, one or several: checkpoints (.pt), Hugging Face folders, GGUF files, Hub names."""
    base_model: str | None = None
    """Base of the adapters among them, where it is not where the adapters say."""
    metrics: tuple[str, ...] = ("perplexity",)
    """perplexity, loss, accuracy (of tokens); of answers to data_dir: bleu, chrf, rouge, exact_match, f1."""
    input: tuple[str, ...] = ()
    """Texts (also --text): UTF-8 files, - for standard input, wikitext2 or c4 as papers measure them, c4:FILE."""
    data_dir: str | None = None
    """Folder made by prepare_data.py, or NAME for data/NAME, or a JSONL of records; only answers are scored."""
    split: str = "val"
    """The split of data_dir: train or val."""
    multiple_choice: tuple[str, ...] = ()
    """JSONL of questions, endings and the right one's number: HellaSwag's, or any of that shape."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-eval, by name or as YAML files (pip install lm-eval)."""
    prompt_template: str = "auto"
    """For records: a template's name, such as dolly or chatml; none = raw text; auto = each model's own."""
    block_size: int | None = None
    """Length of a window in tokens (also --seq_len); the model's context where not given, 2048 at most for papers'."""
    stride: int | None = None
    """Tokens from one window to the next; half a window where not given. Shorter: more context, more time."""
    batch_size: int = 8
    """Windows, prompts or endings read at a time; changes speed and memory, not the result."""
    max_tokens: int | None = None
    """Score only the first N tokens of each text."""
    max_samples: int | None = None
    """Only the first N records of data_dir, questions of multiple_choice, documents of each lm_eval task."""
    max_new_tokens: int = 128
    """Longest answer in tokens; the likeliest token is taken each time."""
    keep_predictions: int = 10
    """How many answers are shown beside their references and kept in the JSON file."""
    json: str | None = None
    """Write the results to this JSON file; `beside`: to NAME.eval.json beside each checkpoint."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
