"""Several machines without a shared disk: whose folder a run goes on from.

Rank 0 writes the run's files on its own machine. After an elastic restart rank 0 may be on another one; then what the
machine with the newest good checkpoint has of the run is copied to the new rank 0 first, and all goes on from there.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import IO

from formats.checkpoint import write_durably
from training.distributed import PIECE, Dist
from training.run_folder import RunFolder, Say

# What a run that moves takes along besides its checkpoint; the rest is made anew.
_MOVES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "training.log", "best.pt")


def fetch_newest(here: Dist, folder: RunFolder, say: Say) -> None:
    """Move the run to rank 0 where another machine's folder holds a newer good checkpoint than rank 0's own.

    What rank 0 had in its folder is set aside. Every process calls this.
    """
    (others,) = here.sum(float(not here.is_main and folder.held and bool(folder.checkpoints())))
    if not others:
        return
    notes: list[str] = []
    found = folder.newest_good(notes.append) if folder.held else None
    mine = [found[1]["step"] if found is not None else -1, socket.gethostname(), [] if here.is_main else notes]
    told = here.gather(mine)
    for rank, (_, host, theirs) in enumerate(told):
        for note in theirs:
            say(f"Rank {rank} on {host}: {note}")
    source = max(range(len(told)), key=lambda rank: (told[rank][0], -rank))
    if source == 0:
        return
    step, host, _ = told[source]
    say(f"The newest checkpoint, of step {step}, is that of rank {source} on {host}: the run moves here from there.")
    here.from_main(lambda: folder.set_aside(None, say, hint=""))
    names = here.from_rank(source, lambda: [name for name in _MOVES if (folder.path / name).is_file()])
    for name in [*names, folder.checkpoint_path(step).name]:  # last, so that a kill in between leaves no half of a run
        _copy(here, source, folder.path / name)


def _copy(here: Dist, source: int, path: Path) -> None:
    """Write on rank 0 the file that `source` has under this name in its own folder."""

    def receive(file: IO[bytes] | None) -> None:
        done = 0
        while piece := here.from_rank(source, partial(_read, path, done)):
            here.from_main(lambda: file.write(piece) if file is not None else 0)
            done += len(piece)

    if here.is_main:
        write_durably(path, receive)
    else:
        receive(None)


def _read(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start, os.SEEK_SET)
        return file.read(PIECE)
