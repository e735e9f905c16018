"""Turn text or instruction records into the token shards that training reads.

python prepare_data.py                                                   # this Python's documentation -> data/pydocs
python prepare_data.py --source pydocs-qa --tokenizer pydocs             # questions on it, with the same tokenizer
python prepare_data.py --source text --input book.txt --data_dir book    # your own text -> data/book
python prepare_data.py --source dolly15k                                 # from the Hugging Face Hub -> data/dolly15k
python prepare_data.py --source dolly15k --input dolly.jsonl --tokenizer logs/model_19072.pt
python prepare_data.py --source jsonl --input chat.jsonl --tokenizer MODEL --prompt_template model --data_dir chat
python prepare_data.py inspect pydocs-qa --block_size 256
"""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.settings import MODEL_TEMPLATE, InspectSettings, PrepareSettings
from training.settings import run_script
from training.stop import interrupt

if TYPE_CHECKING:
    from data.templates import Template
    from data.tokenizer import Tokenizer


def main(settings: PrepareSettings) -> None:
    """Write the set and say what is in it."""
    from data.prepare import output_folder, prepare

    signal.signal(signal.SIGTERM, interrupt)  # else it would end the process with the half-written folder left behind
    tokenizer, template = _of_model(settings)
    manifest = prepare(settings, tokenizer, template)
    print(_summary(manifest))
    print(f"written to {output_folder(settings)}")


def inspect(settings: InspectSettings) -> None:
    """Print what a set holds."""
    from data.inspect import inspect_dataset

    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ  # https://no-color.org
    print(inspect_dataset(settings.data_dir, settings.block_size, settings.records, color=color))


def _of_model(settings: PrepareSettings) -> "tuple[Tokenizer | None, Template | None]":
    """The tokenizer of the model that --tokenizer names, None where it names none, and its template where asked for.

    The data room knows nothing of models, so these are fetched here.
    """
    ref = settings.tokenizer
    path = Path(ref)
    on_hub = "/" in ref and not path.exists() and not path.parent.is_dir()
    if not (ref.endswith((".pt", ".gguf")) or (path / "config.json").is_file() or on_hub):
        return None, None
    from formats.open_model import load_tokenizer_and_template  # brings torch, which the other tokenizers do without

    tokenizer, template = load_tokenizer_and_template(ref)
    if settings.prompt_template != MODEL_TEMPLATE:
        return tokenizer, None
    if template is None:
        raise ValueError(f"{ref}: has no template for prompts; choose another --prompt_template than model")
    return tokenizer, template


def _summary(manifest: dict[str, Any]) -> str:
    """A table of the splits: documents, tokens, share supervised, shards."""
    tokenizer = f"{manifest['tokenizer']['kind']}, {manifest['vocab_size']:,} ids"
    template = f", template {manifest['template']['name']}" if manifest["template"] else ""
    copies = f", {manifest['augmented']:,} of them with their question changed" if manifest["augmented"] else ""
    lines = [f"{manifest['kind']} from {manifest['source']['name']}, tokenizer {tokenizer}{template}"]
    for split, entry in manifest["splits"].items():
        supervised = f", {entry['supervised'] / entry['tokens']:.1%} supervised" if manifest["template"] else ""
        counts = f"{entry['documents']:>9,} documents {entry['tokens']:>14,} tokens{supervised}"
        lines.append(f"  {split:<5} {counts}, shards: {len(entry['shards'])}")
        lines[-1] += copies if split == "train" else ""
    return "\n".join(lines)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["inspect"]:
        description = "Show what a prepared set holds: prepare_data.py inspect DIR"
        run_script(inspect, InspectSettings, description, words[1:], positionals=["data_dir"])
    else:
        run_script(
            main, PrepareSettings, "Turn text or records into token shards. Also: prepare_data.py inspect DIR", words
        )
