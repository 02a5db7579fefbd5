"""Safetensors files that are the same bytes in every process, and what the safetensors library
reads.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from lpl_pretrain.runtime.tensors import DTYPES, safetensors_blocks

FACTS = {f"fact {number}": "value" for number in range(8)}


def tensors():
    torch.manual_seed(0)
    found = {str(dtype): torch.randn(3, 5).mul(9).abs().to(dtype) for dtype in DTYPES}
    return {
        **found,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).T,
    }


def test_the_library_reads_it(tmp_path):
    wanted, path = tensors(), tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.writelines(safetensors_blocks(wanted, FACTS))
    found = load(path.read_bytes())
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == FACTS


def test_bytes_depend_on_the_content_alone():
    first, second = (b"".join(safetensors_blocks(tensors(), FACTS)) for _ in range(2))
    assert first == second
    header = first[8 : 8 + int.from_bytes(first[:8], "little")].decode()
    places = [header.index(name) for name in FACTS]
    assert places == sorted(places), "in the order in which they were given"


def test_a_dtype_that_the_format_lacks():
    with pytest.raises(KeyError, match="complex64"):
        b"".join(safetensors_blocks({"x": torch.zeros(1, dtype=torch.complex64)}))
