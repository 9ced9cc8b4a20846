"""Fuzzes headers of safetensors, compared with the safetensors library."""

import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from fuzzing import COUNTS, JUNK, fuzz, outcome
from hypothesis import strategies as st

from peft_jax.hub.tensors import read_header

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c": np.arange(2, dtype=np.int32),
}


def whole():
    return safetensors.numpy.save(TENSORS, {"format": "pt"})


def parts():
    content = whole()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header, data, *, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if size is None else size
    return (length % 2**64).to_bytes(8, "little") + text + data


NUMBERS = st.sampled_from([-1, 0, 1, 2, 4, 24, 2**31, 2**62, 2**64, 10**30, 1.5, "4", None, True])


@st.composite
def files(draw):
    header, data = parts()
    kind = draw(st.sampled_from(["flip", "cut", "more", "entry", "value", "length", "text"]))
    content = whole()
    if kind == "flip":
        at = draw(st.integers(0, len(content) - len(data) - 1))
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "more":
        return content + draw(st.binary(min_size=1, max_size=9))
    if kind == "length":
        return joined(header, data, size=draw(st.integers(0, 2**64 - 1)))
    if kind == "text":
        return joined(draw(st.binary(max_size=40)), data)
    name = draw(st.sampled_from(sorted(header)))
    if kind == "entry":
        header[name] = draw(JUNK)
    elif name != "__metadata__":
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        several = st.lists(NUMBERS, max_size=3)
        dtypes = st.sampled_from(["F32", "BF16", "F8_E4M3", "f32", "I64", "", None])
        header[name][key] = draw(dtypes if key == "dtype" else several)
    else:
        header[name] = {"a": draw(JUNK)}
    return joined(header, data)


@pytest.mark.parametrize("count", COUNTS)
def test_headers_are_rejected_or_read_as_by_the_library(tmp_path, count):
    file = tmp_path / "model.safetensors"

    def check(content):
        file.write_bytes(content)
        try:
            with safetensors.safe_open(file, "numpy") as library:
                known = {
                    name: tuple(library.get_slice(name).get_shape())
                    for name in list(library.keys())
                }
        except Exception:
            known = None
        found, message = outcome(lambda: read_header(file), names=("model.safetensors",))
        if known is None:
            assert message
        elif not message:
            assert {name: one.shape for name, one in found.items()} == known
        else:
            # The library also accepts dtypes that no parameter has.
            assert "F8" in message or "dtype" in message or "type" in message, message

    fuzz(check, files(), count=count)
