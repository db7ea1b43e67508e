#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated translator in one command: sample corpus, small GPT.
#   bash launch/quickstart.sh
# Safe to stop (Ctrl-C) and to run again: it continues where it stopped. Options go to the training (--run_dir runs/mine).
set -euo pipefail
if [[ " $* " =~ \ (-h|--help)\  ]]; then
    sed -n 's/^# \?//p' "$0" | sed 1d
    exit
fi
cd "$(dirname "$0")/.."
source launch/setup.sh

echo "== 1/3 preparing the sample corpus (made up by grammar templates, not real data)"
python -m data_prep.pairs --source sample --tokenizer sentencepiece --vocabulary_size 600 --output prepared/sample
echo "== 2/3 training a small GPT"
python -m launch.run configs/gpt/sample.yaml "$@" || {
    status=$?
    if [ $status = 75 ]; then echo "Not finished; this goes on where it stopped: bash launch/quickstart.sh $*" >&2; fi
    exit $status
}
echo "== 3/3 evaluating"
run_dir=$(python -m launch.slurm.job run configs/gpt/sample.yaml "$@" | sed -n 2p)
python -m launch.run -m training.evaluation.evaluate "$run_dir"
echo
echo "Translate with it:  .venv/bin/python -m training.evaluation.translate $run_dir '他不想买雨伞。'"
