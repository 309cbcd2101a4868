#!/usr/bin/env bash
# Runs on machines with GPUs under SLURM, with one process per machine that uses all its GPUs.
# SLURM sends SIGTERM 120 seconds before the time limit; the run then saves, exits with 75 and is
# queued again.
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh pretrain --config disco --workdir DIR
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
venv=${DISCO_JAX_VENV:-${SLURM_SUBMIT_DIR:-.}/.venv}
code=0
srun --kill-on-bad-exit=0 "$venv/bin/disco-jax" "$@" --distributed || code=$?
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
