"""Benchmark FID and Inception Score against torch-fidelity, on the same images and weights.

    python tools/bench_evaluate.py --images 256 --rounds 3
    torchrun --nproc-per-node 2 tools/bench_evaluate.py --images 256 --rounds 3 --ours-only

The weights are random in the published layout unless --weights names a file.  Each tool extracts
2,048 features and 1,008 logits from uint8 images in memory and computes FID and Inception Score.
Peak: most bytes of live tensors beyond the images.  Several processes split the batches; rank 0
computes the scores.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lpl_pretrain.config.protocol import ExtractorConfig
from lpl_pretrain.evaluation.feature_store import FeatureStore
from lpl_pretrain.evaluation.fid import frechet_distance
from lpl_pretrain.evaluation.inception import random_weights
from lpl_pretrain.evaluation.inception_score import inception_score
from lpl_pretrain.evaluation.registry import load_extractor
from lpl_pretrain.evaluation.stats import FeatureStatistics
from lpl_pretrain.planning.live_bytes import LiveBytes
from lpl_pretrain.runtime import dist
from lpl_pretrain.runtime.world import World

Result = tuple[float, float]  # FID, Inception Score


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--ours-only", action="store_true")
    args = parser.parse_args()
    world = World.from_environment()
    device = dist.init(world)
    with tempfile.TemporaryDirectory() as name:
        path = args.weights or Path(name) / "weights.pth"
        if args.weights is None:
            torch.save(random_weights(), path)
        images = torch.randint(0, 256, (args.images, 3, args.side, args.side), dtype=torch.uint8)
        real = FeatureStatistics(2048)
        real.update(torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0)))
        tools: dict[str, Callable[[], Result]] = {
            "ours": our_scores(images, real, path, args.batch, world, device)
        }
        if not args.ours_only:
            tools = {
                "torch-fidelity": torch_fidelity(images, real, path, args.batch, device),
                **tools,
            }
        measure(tools, args.rounds, args.images, world)


def our_scores(
    images: Tensor,
    real: FeatureStatistics,
    path: Path,
    batch: int,
    world: World,
    device: torch.device,
) -> Callable[[], Result]:
    extractor = load_extractor(ExtractorConfig(kind="inception", weights=str(path)), device)
    folder = Path(dist.broadcast_json(tempfile.mkdtemp()))

    def run() -> Result:
        store = FeatureStore(folder / "features", len(images), batch)
        for some in store.missing(world.rank, world.world_size):
            store.put(some, extractor(images[some.start : some.stop]))
        dist.barrier()
        scores = (0.0, 0.0)
        if world.rank == 0:
            scores = (
                frechet_distance(store.statistics("pooled"), real),
                inception_score(store.read_all("logits"), seed=None)[0],
            )
            shutil.rmtree(folder / "features")
        dist.barrier()
        return scores

    return run


def torch_fidelity(
    images: Tensor, real: FeatureStatistics, path: Path, batch: int, device: torch.device
) -> Callable[[], Result]:
    from torch_fidelity import metric_fid, metric_isc
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased"]
    network = (
        FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(path))
        .eval()
        .to(device)
    )
    reference = {"mu": real.mean.float().numpy(), "sigma": real.covariance.numpy()}

    @torch.no_grad()
    def run() -> Result:
        scores = [
            tuple(rows.cpu() for rows in network(some.to(device))) for some in images.split(batch)
        ]
        pooled, logits = (torch.cat(rows) for rows in zip(*scores, strict=True))
        mine = metric_fid.fid_features_to_statistics(pooled)
        fid = metric_fid.fid_statistics_to_metric(mine, reference, verbose=False)[
            "frechet_inception_distance"
        ]
        return fid, metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)[
            "inception_score_mean"
        ]

    return run


def measure(
    tools: dict[str, Callable[[], Result]], rounds: int, num_images: int, world: World
) -> None:
    results, peaks, seconds = {}, {}, {name: list[float]() for name in tools}
    for name, run in tools.items():
        with LiveBytes() as live:
            results[name] = run()
        peaks[name] = live.peak
    for _ in range(rounds):
        for name, run in tools.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    if world.rank:
        return
    first = next(iter(tools))
    print(
        f"| {world.world_size} process(es) | images/s | ratio | peak MiB | FID | Inception Score "
        "|\n|---|---|---|---|---|---|"
    )
    for name in tools:
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
        fid, score = results[name]
        rate = num_images / statistics.median(seconds[name])
        print(
            f"| {name} | {rate:.1f} | {ratio:.2f} | {peaks[name] / 2**20:,.0f} | {fid:.6f} | "
            f"{score:.6f} |"
        )


if __name__ == "__main__":
    main()
