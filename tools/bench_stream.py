"""Benchmark our stream against webdataset, StatefulDataLoader and plain reading, in samples/s.

    python tools/bench_stream.py --samples 16384 --rounds 5 [--skip 100000] [--json out.json]

Latents of 4x32x32 (moments 8x32x32 in float16) with class and metadata, in shards of 4096 samples
in the page cache.  All loaders return shuffled batches of 256.  The floor reads every shard once
and views the arrays, without shuffling, copies or batches.  Contestants alternate, each round in
another order; the table has medians, and the ratio's range over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lpl_pretrain.config.dataset import (
    FORMAT_VERSION,
    INDEX_NAME,
    AutoencoderEntry,
    BucketEntry,
    DatasetIndex,
    LatentEntry,
    ShardEntry,
    index_bytes,
    read_index,
    sealed,
)
from lpl_pretrain.config.schema import DataConfig
from lpl_pretrain.data.format import Sample
from lpl_pretrain.data.offsets import SUFFIX, Offsets
from lpl_pretrain.data.stream import LatentStream
from lpl_pretrain.encoding.writer import RECORDS, PartRecord, PartWriter, record_path

CHANNELS, SIDE, BATCH, SHARD = 4, 32, 256, 4096
WORKERS = (0, 1, 2)


def build(folder: Path, samples: int) -> None:
    """Write a finished data folder with the writer that `encode` uses."""
    (folder / RECORDS).mkdir(parents=True)
    writer = PartWriter(folder, "00000-0000", CHANNELS, SHARD, plan="")
    rng = np.random.default_rng(0)
    for n in range(samples):
        moments = rng.standard_normal((2 * CHANNELS, SIDE, SIDE), dtype=np.float32).astype(
            np.float16
        )
        metadata = {
            "class_name": "x",
            "source_px": (256, 256),
            "resized_px": (256, 256),
            "crop_px": (0, 0),
        }
        writer.add(Sample(f"{n:08d}", moments, n % 1000, metadata=metadata), moments)
    writer.finish(skipped=[], class_names={}, source=0)
    record = PartRecord.model_validate_json(record_path(folder, "00000-0000").read_bytes())
    shards: list[ShardEntry] = [entry for _, entry in record.shards]
    index = DatasetIndex(
        format_version=FORMAT_VERSION,
        samples=samples,
        classes=[str(c) for c in range(1000)],
        class_counts=[record.labels.get(c, 0) for c in range(1000)],
        latent=LatentEntry(
            channels=CHANNELS, height=SIDE, width=SIDE, mean=[0.0] * CHANNELS, std=[1.0] * CHANNELS
        ),
        buckets=[BucketEntry(height=SIDE, width=SIDE, samples=samples)],
        autoencoder=AutoencoderEntry(identity="none", downscale=8, shift=0.0, scale=1.0),
        resolution_px=8 * SIDE,
        source_fingerprint="0" * 64,
        fingerprint="",
        shards=shards,
    )
    (folder / INDEX_NAME).write_bytes(index_bytes(sealed(index)))


def floor(folder: Path, samples: int) -> int:
    index = read_index(folder)
    samples_read = 0
    for entry in index.shards:
        path = folder / entry.file
        offsets = Offsets.read(path.with_suffix(SUFFIX), entry)
        with open(path, "rb", buffering=0) as file:
            raw = file.read()
        for start in offsets.moments.tolist():
            np.frombuffer(raw, "<f2", 2 * CHANNELS * SIDE * SIDE, start + 128).reshape(
                2 * CHANNELS, SIDE, SIDE
            )
            samples_read += 1
    return samples_read


def ours(folder: Path, samples: int, workers: int, first: int = 0) -> int:
    stream = LatentStream(DataConfig(folder=str(folder), workers=max(1, workers)), 0, BATCH)
    requests = (range(start, start + BATCH) for start in range(first, first + samples, BATCH))
    batches = map(stream.read, requests) if workers == 0 else stream.prefetch(requests)
    return sum(len(batch.moments) for batch in batches)


def pipeline(folder: Path) -> webdataset.WebDataset:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    shuffled = webdataset.WebDataset(
        urls, shardshuffle=100, workersplitter=webdataset.split_by_worker
    ).shuffle(1000)
    return shuffled.decode().to_tuple("moments.npy", "cls").batched(BATCH)


def count(batches: Iterator[Any], samples: int) -> int:
    samples_read = 0
    for moments, _ in batches:
        samples_read += len(moments)
        if samples_read >= samples:
            break
    return samples_read


def webdataset_loader(folder: Path, samples: int, workers: int) -> int:
    loader = (
        pipeline(folder)
        if workers == 0
        else webdataset.WebLoader(pipeline(folder), batch_size=None, num_workers=workers)
    )
    return count(iter(loader), samples)


def stateful_loader(folder: Path, samples: int, workers: int) -> int:
    return count(
        iter(StatefulDataLoader(pipeline(folder), batch_size=None, num_workers=workers)), samples
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--skip",
        type=int,
        default=100_000,
        help="samples that webdataset skips to resume",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.samples < max(WORKERS) * SHARD:
        parser.error(
            f"--samples={args.samples} is below {max(WORKERS) * SHARD}: each worker "
            f"needs a shard of {SHARD}"
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        prefix="lpl-bench-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
    ) as name:
        folder = Path(name)
        build(folder, args.samples)
        contestants: dict[str, Callable[[], int]] = {
            "floor: read() and view, in order": partial(floor, folder, args.samples)
        }
        for workers in WORKERS:
            contestants |= {
                f"ours, {workers} threads": partial(ours, folder, args.samples, workers),
                f"webdataset, {workers} workers": partial(
                    webdataset_loader, folder, args.samples, workers
                ),
                f"StatefulDataLoader, {workers} workers": partial(
                    stateful_loader, folder, args.samples, workers
                ),
            }
        rates: dict[str, list[float]] = {label: [] for label in contestants}
        for turn in range(args.rounds):
            labels = list(contestants)
            for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
                started = time.perf_counter()
                samples_read = contestants[label]()
                rates[label].append(samples_read / (time.perf_counter() - started))
        resume = compare_resume(folder, args.skip)
    print(table(rates))
    print(resume["text"])
    if args.json:
        args.json.write_text(
            json.dumps({"samples_per_s": rates, "resume": resume}, indent=2) + "\n"
        )


def table(rates: dict[str, list[float]]) -> str:
    base = statistics.median(rates["webdataset, 0 workers"])
    low = statistics.median(rates["floor: read() and view, in order"])
    lines = [f"{'':<36}{'samples/s':>12}{'x webdataset (0 workers)':>28}{'x floor':>10}"]
    for label, values in rates.items():
        each = [
            rate / other for rate, other in zip(values, rates["webdataset, 0 workers"], strict=True)
        ]
        median = statistics.median(values)
        span = f"{median / base:.2f} ({min(each):.2f} to {max(each):.2f})"
        lines.append(f"{label:<36}{median:>12,.0f}{span:>28}{median / low:>10.2f}")
    return "\n".join(lines)


def compare_resume(folder: Path, skip: int) -> dict[str, Any]:
    """Compare seconds to the first batch at sample 10^6, which webdataset reaches by reading."""
    opened = []
    for _ in range(5):
        started = time.perf_counter()
        ours(folder, BATCH, 0, first=10**6)
        opened.append(time.perf_counter() - started)
    started, skipped = time.perf_counter(), 0
    while skipped < skip:
        skipped += webdataset_loader(folder, skip - skipped, 0)
    per_sample_s = (time.perf_counter() - started) / skipped
    ratio = per_sample_s * 10**6 / statistics.median(opened)
    text = (
        f"first batch at sample 10^6: ours {1000 * statistics.median(opened):.1f} ms; webdataset "
        f"skipped {skipped:,} samples at {1 / per_sample_s:,.0f}/s, {per_sample_s * 10**6:,.0f} s "
        f"for 10^6: {ratio:,.0f}x"
    )
    return {
        "ours_s": opened,
        "skipped": skipped,
        "webdataset_s_per_sample": per_sample_s,
        "ratio": ratio,
        "text": text,
    }


if __name__ == "__main__":
    main()
