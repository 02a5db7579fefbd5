"""Hash every tensor of reference runs' last checkpoints, which a refactoring must not change.

    python tools/tensor_hashes.py --output before.json     # commit before the change
    python tools/tensor_hashes.py --output after.json --compare before.json    # after, same machine

Runs: emoji_dit_lpl for 60 updates under local, ddp, fsdp2 and zero2 with LPL from update 20,
uninterrupted and resumed at 30; the emoji MMDiT for 20 updates; and the scores of the first run.
All run in fp32 on at most 2 ranks, in a temporary folder.  The exit status is 1 where a hash
differs from --compare.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
STEPS, RESUMED_AT, LPL_START = 60, 30, 20
STRATEGIES = ("local", "ddp", "fsdp2", "zero2")
FP32 = ["parallel.precision=fp32"]
SCORES = ("metric", "value", "weights", "guidance_scale", "images")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--compare", type=Path, help="JSON of another commit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hashes-") as folder:
        hash_of = all_hashes(Path(folder))
    args.output.write_text(json.dumps(hash_of, indent=1) + "\n")
    print(f"{len(hash_of)} hashes, {digest(json.dumps(hash_of).encode())[:16]} over all")
    if args.compare is None:
        return 0
    wanted = json.loads(args.compare.read_text())
    different = sorted(
        name for name in wanted.keys() | hash_of.keys() if wanted.get(name) != hash_of.get(name)
    )
    for name in different[:20]:
        print(f"differs: {name}")
    print(f"{len(different)} of {len(wanted)} differ")
    return int(bool(different))


def all_hashes(folder: Path) -> dict[str, str]:
    """Hash of each tensor, by `run/file/name`."""
    lpl("encode", "configs/encode/emoji.yaml", f"output={folder}/latents")
    lpl("encode", "configs/encode/emoji_text.yaml", f"output={folder}/text_latents")
    hash_of: dict[str, str] = {}
    for strategy in STRATEGIES:
        run = folder / strategy
        settings = [
            *FP32,
            *(
                "lpl.decoder_precision=fp32",
                f"lpl.start_step={LPL_START}",
                "lpl.calibration_steps=10",
            ),
            *(
                f"data.folder={folder}/latents",
                f"steps={STEPS}",
                f"checkpoint.every_steps={RESUMED_AT}",
            ),
            f"parallel.strategy={strategy}",
        ]
        train = ["train", "configs/train/emoji_dit_lpl.yaml", f"run_dir={run}", *settings]
        lpl(*train, ranks=1 if strategy == "local" else 2)
        last = run / "checkpoints" / f"step_{STEPS:08d}"
        hash_of |= hashes(last, strategy)
        shutil.rmtree(last)
        lpl(*train, ranks=1 if strategy == "local" else 2)
        hash_of |= hashes(last, f"{strategy}, resumed")
    lpl(
        "evaluate",
        str(folder / "local"),
        "configs/evaluate/emoji.yaml",
        "images=64",
        "precision=fp32",
        "--step",
        str(STEPS),
    )
    for record in (folder / "local").glob("evaluations/step_*/*.json"):
        results = [
            {key: entry[key] for key in SCORES}
            for entry in json.loads(record.read_text())["results"]
        ]
        hash_of[f"scores/{record.stem}"] = digest(json.dumps(results).encode())
    settings = [*FP32, f"run_dir={folder}/mmdit", f"data.folder={folder}/text_latents", "steps=20"]
    lpl("train", "configs/train/emoji_mmdit.yaml", *settings)
    return hash_of | hashes(folder / "mmdit" / "checkpoints" / "step_00000020", "mmdit")


def hashes(checkpoint: Path, run: str) -> dict[str, str]:
    """Hash a checkpoint's tensors, read with safetensors alone."""
    hash_of = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            for name in sorted(tensors.keys()):
                hash_of[f"{run}/{file.stem}/{name}"] = digest(tensors.get_tensor(name).tobytes())
    assert hash_of, f"{checkpoint}: no tensors"
    return hash_of


def lpl(*arguments: str, ranks: int = 1) -> None:
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    command = [sys.executable, *torchrun, "-m", "lpl_pretrain", *arguments]
    print(" ".join(["lpl-pretrain", *arguments]), file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
