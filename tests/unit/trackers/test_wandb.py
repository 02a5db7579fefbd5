"""Records that wandb keeps: every line of training and evaluation, also late and out of order; read
back from the run files.
"""

from __future__ import annotations

import json
import struct

import pytest

from lpl_pretrain.config.tracking import WandbConfig
from lpl_pretrain.trackers.wandb import WandbTracker

wandb = pytest.importorskip("wandb")
OFFLINE = WandbConfig(project="p", mode="offline")


def logged(file):
    """Records of a .wandb file, which is a LevelDB log behind 7 bytes: blocks of 32 KiB, headers of
    checksum, length and type.
    """
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def history(folder):
    """All rows of all offline run files, each a dictionary."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in logged(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def record(step, value):
    entry = {"metric": "fid", "weights": "ema", "guidance_scale": 2.5, "value": value}
    return {"step": step, "protocol": {"name": "quick"}, "results": [entry]}


def test_late_and_repeated_steps_are_kept(tmp_path):
    """Training reaches step 30, is preempted and repeats 20; scores of steps 10 and 30 come later,
    that of 30 first.
    """
    trainer = WandbTracker(tmp_path, "run", OFFLINE, {"steps": 30})
    for step in (10, 20, 30, 20, 30):
        trainer.metrics(step, {"loss": 1 / step})
    trainer.close()
    evaluator = WandbTracker(tmp_path, "run", OFFLINE)
    evaluator.score(record(30, 5.0))
    evaluator.score(record(10, 9.0))
    evaluator.close()
    rows = history(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [10, 20, 30, 20, 30]
    scores = {
        row["evaluation/step"]: row["evaluation/quick/fid/ema_w2.5"]
        for row in rows
        if "evaluation/step" in row
    }
    assert scores == {30: 5.0, 10: 9.0}
