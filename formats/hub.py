"""Models by their Hub name, through huggingface_hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?")
# What read_huggingface may open.
_FILES = ["config.json", "generation_config.json", "tokenizer*.json", "vocab.json", "merges.txt", "chat_template.*"]
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
_OLD_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def fetch_from_hub(name: str) -> Path:
    """The local folder of "owner/name" or "owner/name@revision", or the file of "owner/name:file.gguf".

    What the cache lacks is downloaded, with a progress bar; HF_HUB_OFFLINE, and a network that fails, leave the cache.
    pytorch_model.bin is fetched only where there are no safetensors. ValueError in one line where nothing helps.
    """
    found = _NAME.fullmatch(name)
    if found is None or ".." in name:
        raise ValueError(
            f"{name!r} is no model of the Hub: expected owner/name, owner/name@revision or owner/name:FILE.gguf"
        )
    import huggingface_hub

    repository, revision = found["repository"], found["revision"]
    try:
        if found["file"]:
            return Path(huggingface_hub.hf_hub_download(repository, found["file"], revision=revision))
        folder = Path(_snapshot(repository, revision, _FILES + _WEIGHTS))
        if not any(folder.glob("model*.safetensors")):
            _snapshot(repository, revision, _OLD_WEIGHTS)
        return folder
    except Exception as error:  # the library's own, httpx's and OSError
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{repository} could not be fetched from the Hub ({type(error).__name__}: {reason}): "
            "set HF_ENDPOINT to a mirror, or give a local folder"
        ) from None


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> str:
    import huggingface_hub

    return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
