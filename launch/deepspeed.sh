#!/usr/bin/env bash
# Starts a training or an evaluation through DeepSpeed's launcher, on this machine or on all of a hostfile:
#   bash launch/deepspeed.sh training.gpt configs/gpt/sample.yaml [options]
#   NPROC=4 bash launch/deepspeed.sh ...         so many processes a node (default: the GPUs; without any, 2)
#   HOSTFILE=hosts bash launch/deepspeed.sh ...  lines of `NAME slots=N`; all nodes must see this folder
# MASTER_PORT, OMP_NUM_THREADS and DS_ACCELERATOR are taken as they are where they are set.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then
    sed -n '2,6s/^# //p' launch/deepspeed.sh >&2
    exit 1
fi
source launch/setup.sh

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ -n "${HOSTFILE:-}" ]; then
    nodes=(--hostfile "$HOSTFILE" ${NPROC:+--num_gpus "$NPROC"})
else
    processes=${NPROC:-$(( gpus > 0 ? gpus : 2 ))}
    # A hostfile that happens to be at DeepSpeed's usual place is not meant.
    nodes=(--hostfile /dev/null --num_gpus "$processes")
    # Processes that share a CPU must share its cores, too; other nodes take theirs from .deepspeed_env.
    threads=$(( $(getconf _NPROCESSORS_ONLN) / processes ))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}
fi
if [ "$gpus" = 0 ]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}; fi

# Two runs on one machine must not meet. The system gives away the ports above these by itself, so a free one stays free.
port=${MASTER_PORT:-$(python - <<'PY'
import random, socket
while True:
    port = random.randrange(12000, 32000)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)):
            print(port)
            break
PY
)}
# In place of this shell, so that signals to it reach the command; and without a report of every variable that it sets.
exec deepspeed --log_level error "${nodes[@]}" --master_port "$port" --no_local_rank --module "$@"
