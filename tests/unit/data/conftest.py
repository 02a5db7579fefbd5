from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.material import encode_tar


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """23 encoded pictures in several shards."""
    folder, index = encode_tar(tmp_path, 23, shard_max_mib=20 / 1024)
    assert len(index.shards) > 3
    return folder
