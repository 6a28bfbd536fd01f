#!/usr/bin/env bash
#SBATCH --job-name=wovr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@180
#
# One run on several nodes with GPUs, one process a node; queued again when its time ends or it is preempted.
#
#     sbatch launch/slurm.sh --config=configs/pace.py --config.mesh.data=-1 --run=/shared/runs/first
#     sbatch --nodes=4 --gpus-per-node=4 launch/slurm.sh ...          flags of sbatch come before, and win
#
# Submit from the project's folder. The project, its .venv (or PYTHON=...) and the run folder have to be on a file
# system that all nodes share. Three minutes before the end of its time (--signal), and when it is preempted, the job
# has SIGTERM: the run saves and ends with status 143 (docs/reliability.md), and the job goes back into the queue.
set -euo pipefail

if (($# == 0)); then
  sed -n '2,/^set -/{/^#SBATCH/d;/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=${PYTHON:-.venv/bin/python}

# JAX would give each process one GPU, by its number on the node; here a process has all of its node, so that episodes
# and weights are in the memory of a node once.
gpus=${SLURM_GPUS_ON_NODE:-8}
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
export JAX_LOCAL_DEVICE_IDS

# Proxies are not for processes that look for each other.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY

told=0
# shellcheck disable=SC2329  # a trap calls it
tell() {
  told=1
  echo "SIGTERM: the run saves and ends" >&2
  kill -TERM "$step" 2>/dev/null || true # srun passes it on to every process
}

srun --ntasks-per-node=1 "$PYTHON" launch/train.py "$@" &
step=$!
trap tell TERM

# A signal ends wait before the run has ended.
status=0
while :; do
  wait "$step" && status=0 || status=$?
  kill -0 "$step" 2>/dev/null || break
done

if ((status == 143 || (told && status != 0))); then
  echo "status $status: queued again" >&2
  scontrol requeue "$SLURM_JOB_ID" || echo "it could not be: start the same command again" >&2
fi
exit "$status"
