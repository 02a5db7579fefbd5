from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.image_tars import encode_tar


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """23 encoded pictures in several shards."""
    folder, index = encode_tar(tmp_path, 23, shard_samples=6)
    assert len(index.shards) > 3
    return folder
