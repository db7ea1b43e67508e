#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated translator in one command: sample corpus, small GPT, two DDP processes.
#   bash launch/quickstart.sh
# Safe to stop (Ctrl-C) and to run again: it continues where it stopped. Options go to the training (--run_dir runs/mine).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

# One process per GPU where there are any; on a CPU two processes that share its cores.
processes=$(python - <<'PY'
import torch
print(min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2)
PY
)
threads=$(( $(getconf _NPROCESSORS_ONLN) / processes ))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}

echo "== 1/3 preparing the sample corpus (made up by grammar templates, not real data)"
python -m data_prep.pairs --source sample --tokenizer sentencepiece --vocabulary_size 600 --output prepared/sample
echo "== 2/3 training a small GPT with $processes process(es)"
run_dir=$(python -m launch.slurm.job run configs/gpt/sample.yaml "$@" | sed -n 2p)
torchrun --standalone --nproc-per-node="$processes" -m training.gpt configs/gpt/sample.yaml "$@" || true
# torchrun cannot pass on how its processes ended; this file tells.
if ! grep -q '"status": "finished"' "$run_dir/status.json"; then
    if grep -q '"status": "failed"' "$run_dir/status.json"; then exit 1; fi
    echo "The training is not finished; the same command goes on where it stopped: bash launch/quickstart.sh $*" >&2
    exit 75
fi
echo "== 3/3 evaluating"
torchrun --standalone --nproc-per-node="$processes" -m training.evaluation.evaluate "$run_dir"
echo
echo "Translate with it:  .venv/bin/python -m training.evaluation.translate $run_dir '他不想买雨伞。'"
