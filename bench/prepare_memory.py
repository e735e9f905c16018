"""Peak memory of prepare_data.py at 50 MB and at 500 MB of text: it must not grow with the input. Linux.

    python bench/prepare_memory.py [--megabytes 50 500] [--sources text jsonl parquet] [--tokenizer gpt2] [--workers 2]

The text is this Python's documentation, repeated. What is shown is the peak resident memory of the main process and of
its largest worker, and the time. Exit code 1 if the largest input takes more than 1.2 times the memory of the smallest.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Run each source at each size and print the peaks."""
    args = _arguments()
    grew = False
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as name:
        for source in args.sources:
            peaks = []
            for megabytes in args.megabytes:
                path = Path(name) / f"input.{source}"
                write_input(path, source, int(megabytes * 1e6))
                main_mb, worker_mb, seconds = peak_memory(path, source, Path(name) / "set", args)
                path.unlink()
                peaks.append(main_mb)
                peak = f"main {main_mb:6.0f} MB, largest worker {worker_mb:6.0f} MB"
                print(f"{source:<8} {megabytes:>6g} MB: {peak}, {seconds:6.1f} s")
            times = args.megabytes[-1] / args.megabytes[0]
            print(f"{source:<8} {peaks[-1] / peaks[0]:.2f}x the memory for {times:g}x the input")
            grew |= peaks[-1] > 1.2 * peaks[0]
    return int(grew)


def write_input(path: Path, source: str, size: int) -> None:
    """A file of about `size` bytes of text in the form that `source` reads."""
    if source == "parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            rows: list[str] = []
            for document in _documents(size):
                rows.append(document)
                if len(rows) == 1000:
                    writer.write_table(pyarrow.table({"text": rows}))
                    rows.clear()
            writer.write_table(pyarrow.table({"text": rows}))
        return
    with open(path, "w", encoding="utf-8") as file:
        for document in _documents(size):
            file.write(document + "\n" if source == "text" else json.dumps({"text": document}) + "\n")


def _documents(size: int) -> Iterator[str]:
    from data.pydocs import pydocs_documents

    documents, written = list(pydocs_documents()), 0
    while written < size:
        for document in documents:
            if written >= size:
                return
            yield document
            written += len(document.encode())


def peak_memory(path: Path, source: str, out: Path, args: argparse.Namespace) -> tuple[float, float, float]:
    """(peak MB of the main process, peak MB of its largest worker, seconds)."""
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--source", source, "--input", str(path)]
    command += ["--data_dir", str(out), "--tokenizer", args.tokenizer, "--workers", str(args.workers)]
    command += [] if source == "text" else ["--format", "text"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        for pid in (process.pid, *_children(process.pid)):
            peaks[pid] = max(peaks.get(pid, 0.0), _peak_mb(pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"prepare_data.py failed with exit code {process.returncode}")
    workers = [peak for pid, peak in peaks.items() if pid != process.pid]
    return peaks[process.pid], max(workers, default=0.0), time.perf_counter() - began


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _peak_mb(pid: int) -> float:
    """VmHWM of a process in MB, 0 if it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[50, 500], help="sizes, ascending (default: 50 500)"
    )
    parser.add_argument("--sources", nargs="+", default=["text", "jsonl", "parquet"], help="forms of input")
    parser.add_argument("--tokenizer", default="gpt2", help="as in prepare_data.py (default: gpt2)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
