from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.image_tars import encode_tar


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """Folder of 23 encoded images in more than three shards."""
    folder, index = encode_tar(tmp_path, 23, shard_samples=6)
    assert len(index.shards) > 3
    return folder
