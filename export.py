"""Models in and out: Hugging Face folders, GGUF files, PEFT adapters, and this project's checkpoints.

    python export.py import SRC OUT.pt          SRC: a Hugging Face folder, a GGUF file, or a name on the Hub
    python export.py hf CKPT OUT_DIR            a folder that transformers loads
    python export.py gguf CKPT OUT.gguf         a file that llama.cpp loads (--dtype f32, f16 or q8_0)
    python export.py merge ADAPTER OUT.pt       a LoRA adapter and its base as one model
    python export.py peft ADAPTER OUT_DIR       a LoRA adapter or a prefix as PEFT loads it
    python export.py compact CKPT OUT.pt        a pruned model without its zeros, which opens like any checkpoint

Each reads back what it wrote and prints the largest difference. Exit code 2 for bad input.
"""

import sys
from typing import Any

from formats.settings import (
    CompactSettings,
    GgufSettings,
    HuggingFaceSettings,
    ImportSettings,
    MergeSettings,
    PeftSettings,
)
from training.settings import nearest, run_script

# Command: its settings, the words that may stand without a flag, what it does.
COMMANDS: dict[str, tuple[type, tuple[str, ...], str]] = {
    "import": (ImportSettings, ("source", "out"), "import SRC OUT.pt: make a model from elsewhere a checkpoint."),
    "hf": (HuggingFaceSettings, ("checkpoint", "out"), "hf CKPT OUT_DIR: write a folder that transformers loads."),
    "gguf": (GgufSettings, ("checkpoint", "out"), "gguf CKPT OUT.gguf: write a file that llama.cpp loads."),
    "merge": (MergeSettings, ("adapter", "out"), "merge ADAPTER OUT.pt: put a LoRA adapter into its base."),
    "peft": (PeftSettings, ("adapter", "out"), "peft ADAPTER OUT_DIR: write LoRA or a prefix as PEFT loads it."),
    "compact": (CompactSettings, ("checkpoint", "out"), "compact CKPT OUT.pt: write a pruned model without its zeros."),
}


def main(settings: Any) -> None:
    """Do what the settings are of."""
    from formats import export

    work = {
        ImportSettings: export.import_model,
        HuggingFaceSettings: export.export_huggingface,
        GgufSettings: export.export_gguf,
        MergeSettings: export.merge_adapter,
        PeftSettings: export.export_peft,
        CompactSettings: export.export_compact,
    }
    work[type(settings)](settings, print)


def command_line(words: list[str]) -> None:
    """Run `export.py WORDS`; SystemExit with code 2 for a mistake, 0 for help."""
    command, *rest = words or ["--help"]
    if command in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}.{nearest(command, COMMANDS)} (--help lists all)", file=sys.stderr)
        raise SystemExit(2)
    settings, names, description = COMMANDS[command]
    run_script(main, settings, description, rest, positionals=names)


if __name__ == "__main__":
    command_line(sys.argv[1:])
