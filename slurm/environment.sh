# shellcheck shell=bash
# What a node needs before Python runs. Everything that depends on the cluster stands here: change it as yours needs.
# Sourced by the batch scripts on the job's first node; what is exported reaches the processes on all nodes.

# Software, one of these:
#   module load python/3.11 cuda/13.0
#   source "$HOME/miniconda3/etc/profile.d/conda.sh"; conda activate relay
#   container=(apptainer exec --nv --bind "$PWD" "$HOME/relay.sif")      # what stands before every `python`
# shellcheck disable=SC2034  # the batch scripts use it
container=()
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

# Network: the interface that joins the nodes, where the libraries choose another (`python -m launch.doctor` tells).
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Hubs: compute nodes often have no way out. Then fetch base models on the login node, and
#   export HF_HUB_OFFLINE=1
