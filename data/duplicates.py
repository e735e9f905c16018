"""Exact and near duplicates in a stream of texts, by MinHash (Broder 1997) and banded hashing, in bounded memory.

A text is the set of its runs of three words; the share of equal minima under 128 hash functions estimates the Jaccard
similarity of two sets, with a standard error of 0.035 at 0.8. Only texts that agree in a whole band of minima are
compared.

A text may come in parts, question and answer: it is a duplicate if EACH part is. Records that share a long context or a
schema and ask different things of it are none. Every part's runs are hashed apart from the others', so that the minima
of the whole are the smaller ones of its parts', and it is at least as similar as its least similar part.
"""

import hashlib
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np

EXACT: Literal["exact"] = "exact"
NEAR: Literal["near"] = "near"

_HASHES = 128
_RUN = 3  # words
_BLOCK = 1024  # runs hashed at a time: 1 MB
_FOUND = 0.995  # the probability with which a pair as similar as the threshold is compared
# A text that is remembered takes 3 KB, most of it for its bands, and 0.1 KB for exact duplicates.
_NEAR_TEXTS, _EXACT_TEXTS = 1 << 17, 1 << 20
# A character of a script that is written without spaces counts as a word, and so does a sign: a < b is not a > b.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+|[^\\w\\s]")


class Duplicates:
    """Remembers the texts that it was shown, the last 131,072 for near and 1,048,576 for exact duplicates.

    threshold: similarity from which a text is a near duplicate; 1 = exact ones only. The seed chooses the hashes.
    """

    def __init__(self, threshold: float, seed: int) -> None:
        self.threshold = threshold
        self._rows = rows_of_bands(threshold)
        stream = hashlib.shake_128(f"minhash {seed}".encode()).digest(16 * _HASHES)
        self._factors, self._terms = np.frombuffer(stream, dtype="<u8").reshape(2, _HASHES)
        self._exact: OrderedDict[bytes, None] = OrderedDict()
        self._bands: dict[bytes, int] = {}  # a band's minima -> the last text that has them
        self._texts: OrderedDict[int, tuple[np.ndarray, list[bytes]]] = OrderedDict()  # minima of the parts, bands
        self._count = 0

    def seen(self, parts: Sequence[str]) -> Literal["exact", "near"] | None:
        """Whether a text, given in its parts, was there before, but for case and white space. One that was not is
        remembered."""
        plain = [" ".join(part.casefold().split()) for part in parts]
        digest = hashlib.blake2b("\0".join(plain).encode(), digest_size=16).digest()
        if digest in self._exact:
            return EXACT
        if self.threshold < 1:
            minima = np.stack([self.minima(_WORD.findall(text), part) for part, text in enumerate(plain)])
            bands = self._band_keys(minima)
            if self._is_near(minima, bands):
                return NEAR
            self._remember(minima, bands)
        self._exact[digest] = None
        if len(self._exact) > _EXACT_TEXTS:
            self._exact.popitem(last=False)
        return None

    def minima(self, words: list[str], part: int = 0) -> np.ndarray:
        """The smallest hash of the runs of `words` under each function, uint32 (128,). Other parts, other hashes."""
        runs = {"\0".join(words[at : at + _RUN]) for at in range(max(1, len(words) - _RUN + 1))}
        keys = np.array([zlib.crc32(run.encode(), part) for run in runs], dtype=np.uint64)  # (runs,)
        smallest = np.full(_HASHES, 0xFFFFFFFF, dtype=np.uint64)
        for start in range(0, len(keys), _BLOCK):
            # Multiply-shift (Dietzfelbinger 1996): the upper half of a product that wraps is a universal hash.
            hashes = keys[start : start + _BLOCK, None] * (self._factors | np.uint64(1)) + self._terms  # (runs, 128)
            np.minimum(smallest, (hashes >> np.uint64(32)).min(axis=0), out=smallest)
        return smallest.astype(np.uint32)

    def _band_keys(self, minima: np.ndarray) -> list[bytes]:
        """The minima of the whole text, cut into bands; each with its number, so that bands meet their like alone."""
        whole = minima.min(axis=0)  # (128,)
        starts = range(0, _HASHES - self._rows + 1, self._rows)
        return [
            hashlib.blake2b(b"%d " % at + whole[at : at + self._rows].tobytes(), digest_size=8).digest()
            for at in starts
        ]

    def _is_near(self, minima: np.ndarray, bands: list[bytes]) -> bool:
        for number in {self._bands[band] for band in bands if band in self._bands}:
            similarity = (self._texts[number][0] == minima).mean(axis=1)  # (parts,)
            if similarity.min() >= self.threshold:
                return True
        return False

    def _remember(self, minima: np.ndarray, bands: list[bytes]) -> None:
        self._texts[self._count] = minima, bands
        self._bands.update(dict.fromkeys(bands, self._count))
        self._count += 1
        if len(self._texts) > _NEAR_TEXTS:
            forgotten, (_, its_bands) = self._texts.popitem(last=False)
            for band in its_bands:
                if self._bands.get(band) == forgotten:
                    del self._bands[band]


def rows_of_bands(threshold: float) -> int:
    """How many minima make a band: as many, for fewer comparisons in vain, as still find a pair of this similarity."""
    return max(
        rows for rows in range(1, _HASHES + 1) if rows == 1 or 1 - (1 - threshold**rows) ** (_HASHES // rows) >= _FOUND
    )
