#!/usr/bin/env bash
# SLURM:  sbatch --nodes 4 slurm.sh my.yaml [--key value ...]
#
#   PORT=29501          if another run uses the port
#   SAVE_SECONDS=240    how long torchrun waits for a save after a signal to end
#
# srun starts one torchrun a machine, which starts a process for each GPU. DeepSpeed needs no launcher of its own
# here: --deepspeed zero3 is enough. output_dir must lie on a disk that the machines share.
#
# Five minutes before its time is over (USR1), or when it is preempted (TERM), the job saves a checkpoint, ends, and
# requeues itself. SLURM alone does this if a machine failed or a job was preempted, but not if the time ran out. A run
# that failed, is done, or was cancelled (scancel) is not requeued.
#SBATCH --job-name=vlcpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
set -euo pipefail
config=${1:?usage: sbatch slurm.sh CONFIG [--key value ...]}
shift
# torchrun would wait only 30 seconds for a save. Keep it below the 300 above.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-240}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# From SLURM 22.05 on, srun does not take cpus-per-task from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64}

signal=
stop() {
  signal=$1
  kill -TERM "$step" 2>/dev/null || true # srun passes it on to each torchrun
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

# A requeued job continues from its newest checkpoint, or starts if there is none. srun runs in the background, because
# bash handles a signal only between two commands.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-gpu}" \
  --rdzv_backend c10d --rdzv_endpoint "$head:${PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
  -m vlcpt train "$config" --resume_from_checkpoint auto "$@" &
step=$!

wait "$step" || true
while kill -0 "$step" 2>/dev/null; do # a signal ends the wait, not the step
  wait "$step" || true
done
code=0
wait "$step" || code=$? # bash still knows it

# The exit code does not matter here: after a signal torchrun ends with a code of its own.
if [ -n "$signal" ] && [ "$code" -ne 0 ]; then
  case $(scontrol show job "$SLURM_JOB_ID" 2>/dev/null || true) in
    *JobState=CANCELLED*) ;;
    *)
      echo "slurm.sh: interrupted by $signal; requeueing job $SLURM_JOB_ID"
      scontrol requeue "$SLURM_JOB_ID" || true # SLURM itself may have done it for a preempted job
      ;;
  esac
fi
exit "$code"
