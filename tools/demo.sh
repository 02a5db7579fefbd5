#!/usr/bin/env bash
# The whole way on real pictures: encode, train on 2 ranks with LPL, stop in the middle, go on, score, report.
# `make demo` sets up .venv first.  Everything lands in data/emoji_latents and runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=$(( $(nproc) > 2 ? $(nproc) / 2 : 1 ))
RUN=runs/demo
# bf16 where the processor has it; emulated it would take hours
PRECISION=$(python -c "import torch; from lpl_pretrain.runtime.device import bf16_is_native as native
print('bf16' if native(torch.device('cuda' if torch.cuda.is_available() else 'cpu')) else 'fp32')")
TRAIN=(torchrun --standalone --nproc-per-node 2 -m lpl_pretrain train configs/train/emoji_dit_lpl.yaml
       run_dir=$RUN parallel.strategy=fsdp2 parallel.precision=$PRECISION lpl.decoder_precision=$PRECISION)
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
steps_done() { tail -n 1 "$RUN/metrics.jsonl" 2>/dev/null | grep -oP '"step": \K\d+' || echo 0; }
started=$(date +%s)

say "pictures -> latents"
lpl-pretrain encode configs/encode/emoji.yaml
lpl-pretrain encode configs/encode/emoji.yaml --verify
lpl-pretrain data show data/emoji_latents
rm -rf $RUN

say "latents -> checkpoints: ${TRAIN[*]}"
"${TRAIN[@]}" &
trainer=$!
while kill -0 $trainer 2>/dev/null && (( $(steps_done) < 500 )); do sleep 1; done
say "SIGTERM in the middle of it, as a scheduler that wants the machine back would send"
kill -TERM $trainer
wait $trainer || true

say "the same command again: it goes on where it stopped"
"${TRAIN[@]}"

say "checkpoints -> scores"
OMP_NUM_THREADS=$(nproc) lpl-pretrain evaluate $RUN configs/evaluate/emoji.yaml precision=$PRECISION

say "everything on one page"
lpl-pretrain report $RUN
say "open $RUN/report.html  ($(( $(date +%s) - started )) s in all)"
