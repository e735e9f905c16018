"""Our tokenizing beside the usual way (a process pool, one document at a time, Python lists), in turns, whole runs.

    python bench/tokenizing.py [--megabytes 20] [--workers 2] [--rounds 5]

    git clone https://github.com/karpathy/build-nanogpt ../build-nanogpt
    python bench/tokenizing.py --fineweb ../build-nanogpt/fineweb.py

Both read the same JSON lines (this Python's documentation, repeated, in documents of 3,500 characters) and write GPT-2
tokens; a run is timed from the start of its process to its end, so imports, starting workers, digests and flushing to
disk count. CPU seconds (of all processes of a run) are shown too: they bear a busy machine better. With --fineweb the
peer is that script as published, given these documents in place of its download and told to use as many processes;
otherwise it is the same method written here. On a shared machine, a ratio of times under 1.12x is noise.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DOCUMENT = 3500  # characters: about the mean of FineWeb-Edu


class Run(NamedTuple):
    """What one run took, in seconds."""

    time: float
    cpu: float


# What fineweb.py finds in place of the `datasets` library: our documents, the asked number of processes, and the
# tokenizer without its download.
STAND_IN = """
import json, os
import tiktoken
from data.tokenizer import load_tokenizer

os.cpu_count = lambda: 2 * int(os.environ["BENCH_WORKERS"])  # the script starts half as many processes
encoding = load_tokenizer("gpt2")._encoding
tiktoken.get_encoding = lambda name: encoding

class Rows:
    def __iter__(self):
        with open(os.environ["BENCH_DOCUMENTS"], encoding="utf-8") as file:
            yield from map(json.loads, file)

def load_dataset(*args, **named):
    return Rows()
"""


def main() -> None:
    """Run the pairs and print the table."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as name:
        work = Path(name)
        documents = work / "documents.jsonl"
        size = write_documents(documents, int(args.megabytes * 1e6))
        sides = {"ours": our_command(work, documents, args.workers), "peer": peer_command(work, documents, args)}
        runs: dict[str, list[Run]] = {"ours": [], "peer": []}
        for number in range(args.rounds + 1):  # the first pair warms caches and is not counted
            for side in ("ours", "peer") if number % 2 else ("peer", "ours"):
                run = timed(*sides[side])
                if number:
                    runs[side].append(run)
        counts = our_tokens(work), peer_tokens(work)
        assert counts[0] == counts[1], f"different token counts: {counts}"
        report(size, counts[0], runs, "fineweb.py" if args.fineweb else "pool, one document at a time", args.workers)


def write_documents(path: Path, size: int) -> int:
    """Write about `size` bytes of text as JSON lines and return the bytes of text."""
    from data.pydocs import pydocs_documents

    text = "\n\n".join(pydocs_documents())
    pieces = [text[start : start + DOCUMENT] for start in range(0, len(text), DOCUMENT)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            for piece in pieces:
                if written >= size:
                    break
                file.write(json.dumps({"text": piece}) + "\n")
                written += len(piece.encode())
    return written


def our_command(work: Path, documents: Path, workers: int) -> tuple[list[str], dict[str, str]]:
    """prepare_data.py with all documents for training."""
    words = ["--source", "jsonl", "--format", "text", "--input", str(documents), "--data_dir", str(work / "ours")]
    words += ["--val_fraction", "0", "--workers", str(workers)]
    return [sys.executable, str(ROOT / "prepare_data.py"), *words], {}


def peer_command(work: Path, documents: Path, args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """fineweb.py beside a stand-in for its download, or the same way of working from this file."""
    if not args.fineweb:
        return [sys.executable, __file__, "--peer", str(documents), str(work / "peer.npy"), str(args.workers)], {}
    (work / "datasets.py").write_text(STAND_IN)
    (work / "fineweb.py").symlink_to(Path(args.fineweb).resolve())  # it writes beside itself
    environment = {"BENCH_DOCUMENTS": str(documents), "BENCH_WORKERS": str(args.workers)}
    return [sys.executable, str(work / "fineweb.py")], {**environment, "PYTHONPATH": f"{work}{os.pathsep}{ROOT}"}


def timed(command: list[str], environment: dict[str, str]) -> Run:
    """What a command takes, its own processes included."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def our_tokens(work: Path) -> int:
    """Tokens in the set that we wrote."""
    entry: dict[str, Any] = json.loads((work / "ours" / "dataset.json").read_text())["splits"]["train"]
    return int(entry["tokens"])


def peer_tokens(work: Path) -> int:
    """Tokens in the files that the peer wrote."""
    files = [*work.glob("edu_fineweb10B/*.npy"), *work.glob("peer.npy")]
    return sum(len(np.load(path, mmap_mode="r")) for path in files)


def report(size: int, tokens: int, runs: dict[str, list[Run]], peer: str, workers: int) -> None:
    """Print speeds and the ratio of each pair."""
    print(f"{size / 1e6:.1f} MB of text, {tokens:,} tokens, {workers} workers, {len(runs['ours'])} interleaved pairs")
    for side, name in (("ours", "prepare_data.py"), ("peer", peer)):
        seconds, cpu = (statistics.median(values) for values in zip(*runs[side]))
        speed = f"{size / 1e6 / seconds:6.1f} MB/s {tokens / 1e6 / seconds:6.2f} M tokens/s"
        print(f"  {name:<32} {seconds:6.2f} s {speed} {cpu:6.2f} CPU s")
    best = {side: min(run.time for run in runs[side]) for side in runs}
    print(f"  best times: {best['ours']:.2f} s and {best['peer']:.2f} s, ratio {best['peer'] / best['ours']:.2f}x")
    for field in Run._fields:
        ratios = [getattr(theirs, field) / getattr(ours, field) for ours, theirs in zip(runs["ours"], runs["peer"])]
        pairs = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  ratio of {field}: median {statistics.median(ratios):.2f}x (pairs: {pairs})")


# ---- the usual way


def _tokenize(document: dict[str, str]) -> np.ndarray:
    tokens = [50256, *_encoding.encode_ordinary(document["text"])]
    array = np.array(tokens)
    assert (array >= 0).all() and (array < 2**16).all()
    return array.astype(np.uint16)


def _documents(path: str) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


def usual_way(documents: str, out: str, workers: int) -> None:
    """A pool that tokenizes document by document into one large buffer, written at the end."""
    global _encoding
    from data.tokenizer import Gpt2Tokenizer

    _encoding = Gpt2Tokenizer()._encoding
    buffer, count = np.empty(100_000_000, dtype=np.uint16), 0
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for tokens in pool.imap(_tokenize, _documents(documents), chunksize=16):
            buffer[count : count + len(tokens)] = tokens
            count += len(tokens)
    np.save(out, buffer[:count])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20, help="size of the text (default: 20)")
    parser.add_argument("--workers", type=int, default=2, help="processes on either side (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs (default: 5)")
    parser.add_argument("--fineweb", help="path of build-nanogpt's fineweb.py, to run it as the peer")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        usual_way(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
