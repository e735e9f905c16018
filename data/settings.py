"""Settings of `prepare_data.py`. No torch and no NumPy here: `--help` answers at once."""

from dataclasses import dataclass

from data.choices import check_choice
from data.templates import TEMPLATE_NAMES

SOURCES = ("pydocs", "pydocs-qa", "dolly15k", "fineweb-edu", "wikitext", "c4", "text", "jsonl", "parquet")
NEED_INPUT = ("text", "jsonl", "parquet")
FORMATS = ("auto", "text", "instruction")


@dataclass
class PrepareSettings:
    """What becomes a token set, and how."""

    source: str = "pydocs"
    """pydocs, pydocs-qa (the documentation of this Python, as text and as questions with answers; no network needed),
    dolly15k, fineweb-edu, wikitext, c4 (from the Hugging Face Hub, or from local files given by --input),
    text, jsonl, parquet (your own files)."""

    input: tuple[str, ...] = ()
    """Files or folders to read (folders recursively, in sorted order). A .gz file is read as what it holds."""

    data_dir: str | None = None
    """The folder to write. A bare name means data/NAME. Default: data/SOURCE."""

    tokenizer: str = "gpt2"
    """gpt2, byte, bpe (learned from the training text), a tokenizer.json, a folder that holds one or a prepared set,
    or a checkpoint (.pt), whose tokenizer is taken."""

    vocab_size: int = 4096
    """Ids of a bpe tokenizer, the end of text included (at least 257)."""

    shard_size: int | None = None
    """Tokens a shard. Default: 1e8 for text, 1e7 for instructions."""

    val_fraction: float | None = None
    """Share of the documents that goes to the validation split. Default: 0.01 for fineweb-edu and c4, 0.05 for
    instructions, 0.1 for other text."""

    seed: int = 1337
    """Which documents go to validation."""

    workers: int | None = None
    """Processes that tokenize; the result does not depend on it. Default: one a core."""

    prompt_template: str = "dolly"
    """Around instruction records: dolly, alpaca, zh_instruction, human_assistant, zh_code, or a chat template: chatml,
    llama3, qwen2.5, smollm2."""

    format: str = "auto"
    """auto, text or instruction: what the records of JSON and Parquet files are. auto looks at the first record."""

    max_documents: int | None = None
    """Stop after so many documents. Default: all."""

    def __post_init__(self) -> None:
        check_choice("--source", self.source, SOURCES)
        check_choice("--format", self.format, FORMATS)
        check_choice("--prompt_template", self.prompt_template, TEMPLATE_NAMES)
        if self.source in NEED_INPUT and not self.input:
            raise ValueError(f"--source {self.source} reads your own files: name them with --input")
        if self.source.startswith("pydocs") and self.input:
            raise ValueError(f"--source {self.source} takes no --input; for your own files use --source text or jsonl")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val_fraction {self.val_fraction}: expected at least 0 and less than 1")
        for name in ("shard_size", "workers", "max_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")


@dataclass
class InspectSettings:
    """What `prepare_data.py inspect` shows of a token set."""

    data_dir: str
    """The folder of the set, or a name under data/."""

    block_size: int = 1024
    """Context length for which truncation is counted, in tokens."""

    records: int = 3
    """How many records to show decoded."""
