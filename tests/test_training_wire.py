"""What travels between processes arrives as it was: every kind of value, every dtype, no size and odd sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats.checkpoint import load_checkpoint, save_checkpoint
from formats.gguf_write import write_gguf
from formats.hf_write import write_huggingface
from formats.open_model import load_payload
from formats.peft import write_peft
from tests.adapters import make_adapter
from tests.full_checkpoints import full_payload
from tests.masked_models import save_pruned
from tests.tiny_checkpoints import save_tiny
from training.wire import pack, unpack

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.uint16, torch.uint32, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def sent(value: Any) -> Any:
    """`value` as another process gets it."""
    head, buffers = pack(value)
    waiting = iter(buffers)
    result = unpack(head, lambda buffer: buffer.copy_(next(waiting)))
    assert next(waiting, None) is None, "a buffer was not asked for"
    return result


def equal(one: Any, two: Any) -> bool:
    """`one` is what arrived of `two`: to the last bit, NaN equal to NaN, with the same types."""
    if type(one) is not (dict if isinstance(two, dict) else type(two)):  # a state_dict, say, arrives as a dict
        return False
    if isinstance(one, Tensor):
        same_kind = one.dtype == two.dtype and one.shape == two.shape
        raw = [each.contiguous().flatten().view(torch.uint8) for each in (one, two)]
        return same_kind and torch.equal(*raw)
    if isinstance(one, dict):
        return list(map(repr, one)) == list(map(repr, two)) and all(map(equal, one.values(), two.values()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, float):
        return repr(one) == repr(two)  # NaN, and the sign of zero
    return bool(one == two)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = math.prod(shape) * dtype.itemsize
    raw = torch.tensor(draw(st.lists(st.integers(0, 1 if dtype is torch.bool else 255), min_size=size, max_size=size)))
    tensor = raw.to(torch.uint8).view(dtype).view(shape)
    if draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, 1)  # not contiguous
    return tensor


keys = st.one_of(st.text(max_size=3), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.just(Path("a/b c")))
nests = st.recursive(
    st.one_of(plain, tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(nests)
def test_a_nest_arrives_equal(nest: Any) -> None:
    assert equal(sent(nest), nest)


def test_a_checkpoint_arrives_equal(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.pt", full_payload())
    payload = load_checkpoint(tmp_path / "model.pt")
    assert equal(sent(payload), payload)


def test_whatever_a_run_may_start_from_arrives_equal(tmp_path: Path) -> None:
    """What readers of other formats make of a file holds only values that can be sent."""
    base = save_tiny(tmp_path / "base.pt", template="dolly")
    save_pruned(tmp_path / "pruned.pt")
    write_gguf(load_payload(base), tmp_path / "base.gguf")
    write_huggingface(load_payload(base), tmp_path / "hf")
    write_peft(load_payload(make_adapter(base, tmp_path / "adapter.pt")), tmp_path / "peft")
    for name in ("base.pt", "pruned.pt", "base.gguf", "hf", "adapter.pt", "peft"):
        payload = load_payload(tmp_path / name, base_model=base)
        assert equal(sent(payload), payload), name


def test_keys_may_be_called_as_the_kinds_are() -> None:
    value = {"tensor": ["float32", [2]], "path": {"bytes": 3}}
    assert equal(sent(value), value)


def test_contiguous_tensors_are_not_copied_before_they_are_sent() -> None:
    tensor = torch.arange(6.0).view(2, 3).requires_grad_()
    _, (buffer,) = pack([tensor])
    assert buffer.data_ptr() == tensor.data_ptr() and buffer.shape == (24,)


@pytest.mark.parametrize("value", [{1, 2}, 1j, object(), torch.eye(3).to_sparse()])
def test_other_kinds_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is not sent to other processes"):
        pack({"inner": [value]})
