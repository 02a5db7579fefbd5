"""Train the emoji DiT for a few steps from Python:

lpl-pretrain encode configs/encode/emoji.yaml
python examples/train_from_python.py [KEY=VALUE ...]
"""

import json
import sys

from lpl_pretrain import TrainConfig, load_config, train

overrides = [
    "run_dir=runs/from_python",
    "steps=20",
    "lpl.start_step=0.5",
    "lpl.calibration_steps=5",
    "parallel.precision=fp32",
    "lpl.decoder_precision=fp32",
    *sys.argv[1:],  # the last value of a key counts
]
config = load_config(TrainConfig, "configs/train/emoji_dit_lpl.yaml", overrides)
run = train(config)  # started again, it resumes
lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
last = [line for line in lines if "event" not in line][-1]
print(f"{run.path}: step {last['step']}, loss {last['loss/total']:.4f}")
