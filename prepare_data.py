"""Turn text or instruction records into the token shards that training reads.

python prepare_data.py                                                   # this Python's documentation -> data/pydocs
python prepare_data.py --source pydocs-qa --tokenizer pydocs             # questions on it, with the same tokenizer
python prepare_data.py --source text --input book.txt --data_dir book    # your own text -> data/book
python prepare_data.py --source dolly15k                                 # from the Hugging Face Hub -> data/dolly15k
python prepare_data.py --source dolly15k --input dolly.jsonl --tokenizer logs/model_19072.pt
python prepare_data.py inspect pydocs-qa --block_size 256
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.settings import InspectSettings, PrepareSettings
from training.settings import run_script

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer


def main(settings: PrepareSettings) -> None:
    """Write the set and say what is in it."""
    from data.prepare import output_folder, prepare

    # Without this, SIGTERM would end the process with the half-written folder left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        manifest = prepare(settings, _model_tokenizer(settings.tokenizer))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    print(_summary(manifest))
    print(f"written to {output_folder(settings)}")


def inspect(settings: InspectSettings) -> None:
    """Print what a set holds."""
    from data.inspect import inspect_dataset

    print(inspect_dataset(settings.data_dir, settings.block_size, settings.records))


def _model_tokenizer(ref: str) -> "Tokenizer | None":
    """The tokenizer of a model; None where `ref` is none but a tokenizer itself or a prepared set.

    The data room knows nothing of models, so their tokenizers are fetched here.
    """
    path = Path(ref)
    on_hub = "/" in ref and not path.exists() and not path.parent.is_dir()
    if not (ref.endswith((".pt", ".gguf")) or (path / "config.json").is_file() or on_hub):
        return None
    from formats.open_model import load_any_tokenizer  # brings torch, which the other tokenizers do without

    return load_any_tokenizer(ref)


def _summary(manifest: dict[str, Any]) -> str:
    """A table of the splits: documents, tokens, share supervised, shards."""
    tokenizer = f"{manifest['tokenizer']['kind']}, {manifest['vocab_size']:,} ids"
    template = f", template {manifest['template']['name']}" if manifest["template"] else ""
    lines = [f"{manifest['kind']} from {manifest['source']['name']}, tokenizer {tokenizer}{template}"]
    for split, entry in manifest["splits"].items():
        supervised = f", {entry['supervised'] / entry['tokens']:.1%} supervised" if manifest["template"] else ""
        counts = f"{entry['documents']:>9,} documents {entry['tokens']:>14,} tokens{supervised}"
        lines.append(f"  {split:<5} {counts}, shards: {len(entry['shards'])}")
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
