"""Documents and records to token ids: batch by batch, in several processes, in order, in constant memory."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from data.records import Sample, Unusable
from data.rendering import Renderer
from data.shards import token_dtype
from data.tokenizer import Tokenizer, tokenizer_from_spec

SKIP_REMEDY = "--bad_records skip leaves such records out"
DAMAGED = "that are damaged"  # why a sample is left out
_BATCH_CHARACTERS = 1 << 19  # 40 ms of work: long against the 1 ms that sending it costs
_AHEAD = 4  # batches a worker: results are taken in order, so one slow worker must not leave the others idle
_BATCH_ITEMS = 4096
_THREADED = {"torch", "pyarrow", "datasets", "tokenizers"}
_WORTH_A_POOL = 8  # batches; starting processes takes as long as tokenizing 3 MB


class Item(NamedTuple):
    """A document, a part of one, or a sample made of a record, and the split that it goes to."""

    split: str
    body: str | Sample
    begins: bool = True  # a new document begins here
    ends: bool = True  # and ends here, with the end of text


class Encoded(NamedTuple):
    """A batch as ids: those of all items joined (n,), their mask (n,) if these are samples, and how to part them.

    cut, left_out: how many samples lost what, and how many gave no documents for which reason.
    """

    ids: np.ndarray
    mask: np.ndarray | None
    parts: list[tuple[str, bool, int]]  # split, begins a document, number of ids
    cut: Counter[str]
    left_out: Counter[str]


class Encoder:
    """Turns batches of items into ids. With a renderer the bodies are samples, without one they are text.

    skip_damaged: leave out samples that the template refuses instead of raising ValueError.
    """

    def __init__(self, tokenizer: Tokenizer, renderer: Renderer | None, skip_damaged: bool = False) -> None:
        self.tokenizer, self.renderer, self.skip_damaged = tokenizer, renderer, skip_damaged
        self._dtype = token_dtype(tokenizer.vocab_size)  # half of what the tokenizer gives, when sent between processes
        self._bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=np.uint32)
        self._eot = np.array([tokenizer.eot_id], dtype=np.uint32)

    def __reduce__(self) -> tuple[Any, ...]:
        """How a spawned worker gets its own: rebuilt from specifications. A forked one has this very object."""
        return _rebuilt, (self.tokenizer.spec(), self.renderer, self.skip_damaged)

    def __call__(self, batch: list[Item]) -> Encoded:
        if self.renderer is not None:
            return self._samples(batch, self.renderer)
        arrays = [np.empty(0, dtype=np.uint32)]
        parts = []
        for split, body, begins, ends in batch:
            assert isinstance(body, str), "a sample needs a renderer"
            new = [self._bos] * begins + [self.tokenizer.encode_numpy(body)] + [self._eot] * ends
            arrays += new
            parts.append((split, begins, sum(map(len, new))))
        return Encoded(np.concatenate(arrays).astype(self._dtype), None, parts, Counter(), Counter())

    def _samples(self, batch: list[Item], renderer: Renderer) -> Encoded:
        ids: list[int] = []
        mask: list[int] = []
        encoded = Encoded(np.empty(0), np.empty(0), [], Counter(), Counter())
        for split, body, _, _ in batch:
            assert isinstance(body, Sample), "text needs no renderer"
            try:
                documents, cut = renderer.documents(body, self.tokenizer)
            except Unusable as reason:
                encoded.left_out[reason.why] += 1
                continue
            except ValueError as error:
                if not self.skip_damaged:
                    raise ValueError(f"{body.where}: {error}; {SKIP_REMEDY}") from None
                encoded.left_out[DAMAGED] += 1
                continue
            encoded.cut.update(cut)
            for new_ids, new_mask in documents:
                ids += new_ids
                mask += new_mask
                encoded.parts.append((split, True, len(new_ids)))
        return encoded._replace(ids=np.array(ids, dtype=self._dtype), mask=np.array(mask, dtype=np.uint8))


def encode_all(
    items: Iterable[Item],
    tokenizer: Tokenizer,
    renderer: Renderer | None,
    workers: int,
    skip_damaged: bool = False,
) -> Generator[Encoded, None, None]:
    """Encode `items` with `workers` processes. The result is in order and the same for any number of them.

    At most 4 * workers batches are on their way at a time, whatever the input's size.
    Raises OSError when a worker dies, and what reading `items` raises.
    """
    batches = _batches(items)
    encoder = Encoder(tokenizer, renderer, skip_damaged)
    first = list(itertools.islice(batches, _WORTH_A_POOL)) if workers > 1 else []
    if workers == 1 or len(first) < _WORTH_A_POOL:
        yield from map(encoder, itertools.chain(first, batches))
    else:
        yield from _in_pool(itertools.chain(first, batches), encoder, workers)


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.body) if isinstance(item.body, str) else len(item.body.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_ITEMS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_pool(batches: Iterable[list[Item]], encoder: Encoder, workers: int) -> Generator[Encoded, None, None]:
    context = multiprocessing.get_context(_start_method(encoder.tokenizer))
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    under_way: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_work, batch))
            if len(under_way) >= _AHEAD * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a tokenizing process was killed (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_method(tokenizer: Tokenizer) -> str:
    """fork where this process has no threads, as in prepare_data.py (it saves 0.3 s of imports a worker), else spawn.

    A fork copies other threads' locks in whatever state; the libraries named here start threads unknown to Python.
    """
    threaded = threading.active_count() > 1 or tokenizer.kind == "bpe" or _THREADED.intersection(sys.modules)
    return "fork" if sys.platform == "linux" and not threaded else "spawn"


# ---- inside a worker

_encoder: Encoder | None = None


def _rebuilt(tokenizer: dict[str, Any], renderer: Renderer | None, skip_damaged: bool) -> Encoder:
    return Encoder(tokenizer_from_spec(tokenizer), renderer, skip_damaged)


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = encoder


def _end_with_parent() -> None:
    """Workers wait for work on a pipe that stays open when the parent is killed: they would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(batch: list[Item]) -> Encoded:
    assert _encoder is not None
    return _encoder(batch)
