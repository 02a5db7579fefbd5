"""Count the bytes per parameter that each rank holds under each strategy, against the theory.

    python tools/bench_memory.py --worlds 1 2 4 [--precision bf16]

DiTs of width 256, AdamW, one EMA, gloo ranks on this machine.  Every live tensor storage of the
process is counted once, after backward, when activations are freed, and before the update.  The
number of bytes is the slope between depths 4 and 12; buffers of fixed size are listed in MiB beside
it.  `expected`, per parameter and rank, with N ranks:

    local    master 4 + gradient 4 + moments 8 + EMA 4
    ddp      master 4 + gradient 4 + moments 8 + EMA 4/N; the same for zero0
    fsdp2    (master 4 + gradient 4 + moments 8 + EMA 4)/N
    zero     as in DeepSpeed's paper (arXiv 1910.02054, figure 1), except for gradients, which are
             accumulated in float32: the working copy (bf16: 2) is divided in stage 3, the gradient
             4 from stage 2 on, master 4 + moments 8 + EMA 4 always; stage 1 keeps the bf16 gradient
             (2) beside its float32 sum
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lpl_pretrain.config.dataset import LatentEntry
from lpl_pretrain.config.model import DiTConfig
from lpl_pretrain.config.schema import EMAConfig, OptimizerConfig, ParallelConfig
from lpl_pretrain.ema.tracker import EMATracker
from lpl_pretrain.models.build import build_denoiser
from lpl_pretrain.models.conditioning import Conditioning
from lpl_pretrain.parallel.build import make_strategy, needs_process_group
from lpl_pretrain.runtime import dist
from lpl_pretrain.runtime.world import World
from lpl_pretrain.trainer.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parents[1]
DEPTHS = (4, 12)
STRATEGIES = ("local", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
LATENT = LatentEntry(channels=4, height=16, width=16, mean=[0.0] * 4, std=[1.0] * 4)
STATE = 4 + 8 + 4  # master, moments, EMA


def expected(strategy: str, ranks: int, working: int) -> float:
    """Bytes per parameter and rank.

    `working` is the element size of the copy that the forward reads, 0 where that is the master.
    """
    return {
        "local": 4 + STATE,
        "ddp": 4 + 4 + 8 + 4 / ranks,
        "fsdp2": (4 + STATE) / ranks,
        "zero0": 4 + 4 + 8 + 4 / ranks,
        "zero1": working + working + 4 + STATE / ranks,
        "zero2": working + (4 + STATE) / ranks,
        "zero3": (working + 4 + STATE) / ranks,
    }[strategy]


def live_bytes() -> int:
    """Bytes of all tensor storages of this process, each counted once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type != "meta":
            # a gradient may not be a Python object yet
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None:
                    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                    storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def run_rank(strategy: str, precision: str, depth: int, output: Path) -> None:
    """Run one rank of one strategy; rank 0 writes the mean over ranks to `output`."""
    world = World.from_environment()
    raw: dict[str, object] = {"strategy": strategy, "precision": precision}
    if strategy.startswith("zero"):
        raw = {
            "strategy": "zero",
            "zero_config": str(ROOT / f"configs/zero/{strategy}.json"),
            "precision": precision,
        }
    parallel = ParallelConfig.model_validate(raw)
    device = dist.init(world, group=needs_process_group(parallel))
    before = live_bytes()
    model = build_denoiser(
        DiTConfig(width=256, depth=depth, heads=4, patch_size=2), LATENT, num_classes=10
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = make_strategy(parallel, world, device)
    optimizer = OptimizerConfig()
    denoiser = engine.setup(
        model, model.sharded_blocks(), lambda params: make_optimizer(optimizer, params)
    )
    ema = EMATracker(engine.local_params(), EMAConfig())

    def backward() -> None:
        z_t, t = torch.randn(2, 4, 16, 16), torch.rand(2)
        output = denoiser(z_t, t, Conditioning(torch.tensor([1, 2]))).output
        engine.backward(output.float().square().mean(), microbatch=0, of=1)

    for step in (1, 2):
        backward()
        engine.step(lr=1e-4, max_grad_norm=1.0)
        ema.update(step)
    backward()
    local_bytes = torch.tensor([float(live_bytes() - before)])
    total = dist.sum_over_ranks(local_bytes) / world.world_size
    if world.rank == 0:
        output.write_text(json.dumps({"parameters": parameters, "bytes": total.item()}))
    dist.exit()


def count(strategy: str, precision: str, ranks: int, depth: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
        ]
        command = [
            *launcher,
            __file__,
            "--precision",
            precision,
            "--run_rank",
            strategy,
            str(depth),
            str(output),
        ]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument(
        "--run_rank",
        nargs=3,
        metavar=("STRATEGY", "DEPTH", "FILE"),
        help="internal: run one rank",
    )
    args = parser.parse_args()
    if args.work:
        run_rank(args.work[0], args.precision, int(args.work[1]), Path(args.work[2]))
        return
    print(f"bytes per parameter and rank, {args.precision}: counted (expected, ratio) + fixed")
    print(f"{'':<8}" + "".join(f"{f'{ranks} ranks':>32}" for ranks in args.worlds))
    for strategy in args.strategies:
        cells = []
        for ranks in args.worlds:
            if strategy == "local" and ranks > 1:
                cells.append("")
                continue
            small, large = (count(strategy, args.precision, ranks, depth) for depth in DEPTHS)
            slope = (large["bytes"] - small["bytes"]) / (large["parameters"] - small["parameters"])
            fixed_mib = (small["bytes"] - slope * small["parameters"]) / 2**20
            wanted = expected(strategy, ranks, 2 if args.precision == "bf16" else 0)
            cells.append(f"{slope:.2f} ({wanted:.2f}, {slope / wanted:.3f}) + {fixed_mib:.0f} MiB")
        print(f"{strategy:<8}" + "".join(f"{cell:>32}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
