"""Settings of `prepare_data.py`. No torch and no NumPy here: `--help` answers at once."""

import re
from dataclasses import dataclass
from pathlib import Path

from data.choices import check_choice
from data.templates import TEMPLATE_NAMES

EMBEDDED = ("pydocs", "pydocs-qa", "arithmetic")  # made here, without network or input
SOURCES = (*EMBEDDED, "dolly15k", "fineweb-edu", "wikitext", "c4", "text", "jsonl", "parquet")
NEED_INPUT = ("text", "jsonl", "parquet")
FORMATS = ("auto", "text", "instruction", "sharegpt", "messages", "code", "preference", "prompts")
MODEL_TEMPLATE = "model"
WORDNET = "wordnet"
_JINJA = (".jinja", ".jinja2", ".j2")
_HUB_SET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass
class PrepareSettings:
    """What becomes a token set, and how."""

    source: str = "pydocs"
    """pydocs, pydocs-qa (the documentation of this Python, as text and as questions with answers; no network needed),
    arithmetic (sums of a number below 100 and a digit, which a reward can check), dolly15k, fineweb-edu, wikitext, c4
    (from the Hugging Face Hub, or from local files given by --input), text, jsonl, parquet (your own files), or
    OWNER/NAME or OWNER/NAME:CONFIGURATION, any other set of the Hub."""

    input: tuple[str, ...] = ()
    """Files or folders to read (folders recursively, in sorted order). A .gz file is read as what it holds."""

    data_dir: str | None = None
    """The folder to write. A bare name means data/NAME. Default: data/SOURCE, without OWNER and CONFIGURATION."""

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
    """Around records: dolly, alpaca, zh_instruction, human_assistant, zh_code, or a chat template: chatml, llama3,
    qwen2.5, smollm2; model (the one of the model that --tokenizer names), or a file of Jinja (NAME.jinja)."""

    system: str | None = None
    """A system message for every conversation that has none of its own."""

    train_on: str = "all"
    """all or last: which answers of a conversation are learnt. Of a pair those behind the shared prompt always are."""

    max_length: int | None = None
    """Tokens that a record may have. A longer one loses whole turns, the oldest first, then the beginning of its
    question; an answer is cut last, and that is said. Default: no limit, training cuts at its block size."""

    format: str = "auto"
    """What the records are: text, instruction (Dolly's and Alpaca's fields), sharegpt (conversations), messages
    (OpenAI's, or prompt and completion), code (problem, solution), preference (chosen, rejected; gives pairs for DPO),
    prompts (of any of these; nothing is supervised, for GRPO). auto goes by the fields of the first record."""

    bad_records: str = "error"
    """error or skip: what happens to damaged records, such as a conversation that the assistant begins, with two
    users in a row or an unknown role. skip leaves them out and counts them. Records without a question or an answer
    are always left out and counted; broken JSON is always an error."""

    clean: bool = False
    """Repair Unicode and white space, leave out what is empty, too long or there before, and say what went and why."""

    duplicate_similarity: float = 0.8
    """With --clean: from which similarity of its question and of its answer a record is a near duplicate. 1 leaves out
    exact duplicates only."""

    max_characters: int = 100_000
    """With --clean: a longer record is left out."""

    strip_punctuation: bool = False
    """With --clean: take out of records whatever is no letter, digit or space. It takes code and formulas apart."""

    augment_ratio: float = 0.0
    """Share of the training records that get a second copy with the question said in another way: put into another
    frame, or with synonyms for some words where there is a --thesaurus. Answers stay as they are."""

    thesaurus: str | None = None
    """With --augment_ratio: a file with a word and its synonyms a line, with commas between, or wordnet (through nltk,
    where it is installed)."""

    max_documents: int | None = None
    """Stop after so many documents. Default: all."""

    def __post_init__(self) -> None:
        if not _HUB_SET.fullmatch(self.source):
            check_choice("--source", self.source, SOURCES)
        check_choice("--format", self.format, FORMATS)
        check_choice("--train_on", self.train_on, ("all", "last"))
        check_choice("--bad_records", self.bad_records, ("error", "skip"))
        if not is_jinja_file(self.prompt_template):
            check_choice("--prompt_template", self.prompt_template, (*TEMPLATE_NAMES, MODEL_TEMPLATE))
        if self.source in NEED_INPUT and not self.input:
            raise ValueError(f"--source {self.source} reads your own files: name them with --input")
        if self.source in EMBEDDED and self.input:
            raise ValueError(f"--source {self.source} takes no --input; for your own files use --source text or jsonl")
        if not 0 < self.duplicate_similarity <= 1:
            raise ValueError(f"--duplicate_similarity {self.duplicate_similarity}: expected more than 0, at most 1")
        if self.strip_punctuation and not self.clean:
            raise ValueError("--strip_punctuation is a part of --clean: give both")
        if not 0 <= self.augment_ratio <= 1:
            raise ValueError(f"--augment_ratio {self.augment_ratio}: expected 0 to 1")
        if self.thesaurus is not None and not self.augment_ratio:
            raise ValueError("--thesaurus is for --augment_ratio, which is 0: give both")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val_fraction {self.val_fraction}: expected at least 0 and less than 1")
        for name in ("shard_size", "workers", "max_documents", "max_length", "max_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: expected at least 1")


def is_jinja_file(prompt_template: str) -> bool:
    """Whether --prompt_template is a file, not the name of a template."""
    return Path(prompt_template).suffix in _JINJA


@dataclass
class InspectSettings:
    """What `prepare_data.py inspect` shows of a token set."""

    data_dir: str
    """The folder of the set, or a name under data/."""

    block_size: int = 1024
    """Context length for which truncation is counted, in tokens."""

    records: int = 3
    """How many records to show decoded."""
