#!/usr/bin/env bash
# SLURM:  sbatch --nodes 4 slurm.sh my.yaml [--key value ...]
#
#   PORT=29501          where another run has the port
#   SAVE_SECONDS=240    how long torchrun lets a save take, once the job is told to end
#
# srun starts one torchrun a machine, which starts a process for each GPU. DeepSpeed needs no launcher of its own
# here: --deepspeed zero3 is enough. output_dir must lie on a disk that the machines share.
#SBATCH --job-name=vlcpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -euo pipefail
config=${1:?usage: sbatch slurm.sh CONFIG [--key value ...]}
shift
# Five minutes before the time is over a checkpoint is saved; torchrun would wait only 30 seconds for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-240}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# From SLURM 22.05 on srun takes no cpus-per-task over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64}

# A requeued job goes on from its newest checkpoint; where there is none, it starts.
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-gpu}" \
  --rdzv_backend c10d --rdzv_endpoint "$head:${PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
  -m vlcpt train "$config" --resume_from_checkpoint auto "$@"
