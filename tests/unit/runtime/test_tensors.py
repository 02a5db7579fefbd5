"""Written safetensors files have the same bytes in every process, and the safetensors library reads
them.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from lpl_pretrain.runtime.tensors import DTYPES, safetensors_blocks

METADATA = {f"key {number}": "value" for number in range(8)}


def tensors():
    torch.manual_seed(0)
    by_dtype = {str(dtype): torch.randn(3, 5).mul(9).abs().to(dtype) for dtype in DTYPES}
    return {
        **by_dtype,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).T,
    }


def test_the_library_reads_the_file(tmp_path):
    wanted = tensors()
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.writelines(safetensors_blocks(wanted, METADATA))
    loaded = load(path.read_bytes())
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA


def test_bytes_depend_on_the_content_alone():
    first, second = (b"".join(safetensors_blocks(tensors(), METADATA)) for _ in range(2))
    assert first == second
    header = first[8 : 8 + int.from_bytes(first[:8], "little")].decode()
    offsets = [header.index(name) for name in METADATA]
    assert offsets == sorted(offsets), "metadata keep their order"


def test_an_unsupported_dtype_is_refused():
    with pytest.raises(KeyError, match="complex64"):
        b"".join(safetensors_blocks({"x": torch.zeros(1, dtype=torch.complex64)}))
