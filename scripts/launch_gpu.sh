#!/usr/bin/env bash
# Starts the trainer on this node, on all of its GPUs, alone or as one of several nodes; one call on each of them:
#
#   bash scripts/launch_gpu.sh configs/my.yml key=value ...                                             one node
#   NNODES=2 NODE_RANK=0 COORDINATOR=node0:6002 bash scripts/launch_gpu.sh configs/my.yml key=value ... the first of two
#
# COORDINATOR is the first node's name or address, with a free port. Ends with the trainer's status, and with 143 after
# a SIGTERM that was answered with a checkpoint: the same calls go on from there. With Slurm: deploy/slurm.sbatch.
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit
fi
fail() { echo "launch_gpu.sh: $1" >&2; exit 2; }

[[ $# -gt 0 && $1 != *=* ]] || fail "the first argument is the run's yml: bash scripts/launch_gpu.sh CONFIG.yml key=value ..."
config=$(realpath -- "$1")
shift
nodes=${NNODES:-1}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES=$nodes: a number of nodes is expected"
if ((nodes > 1)); then
  [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] && ((NODE_RANK < nodes)) || fail "NODE_RANK=${NODE_RANK:-}: 0 to $((nodes - 1)) is expected"
  [[ ${COORDINATOR:-} =~ ^([^:]+):([0-9]+)$ ]] || fail "COORDINATOR=${COORDINATOR:-}: HOST:PORT of the first node is expected"
  # What MaxText reads with hardware=gpu.
  export NNODES NODE_RANK JAX_COORDINATOR_IP=${BASH_REMATCH[1]} JAX_COORDINATOR_PORT=${BASH_REMATCH[2]}
else
  unset JAX_COORDINATOR_IP # without it MaxText connects to nobody
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[[ -x $python ]] || python=python # in an image of docker/Dockerfile.gpu
exec bash deploy/restartable.sh "$python" MaxText/train.py "$config" hardware=gpu "$@"
