#!/usr/bin/env bash
# SLURM:  sbatch --nodes 4 slurm.sh my.yaml [--key value ...]
#
#   PORT=29501          where another run has the port
#   SAVE_SECONDS=240    how long torchrun lets a save take, once the job is told to end
#
# srun starts one torchrun a machine, which starts a process for each GPU. DeepSpeed needs no launcher of its own
# here: --deepspeed zero3 is enough. output_dir must lie on a disk that the machines share.
#
# Five minutes before its time is over (USR1), or when it is preempted (TERM), the job saves a checkpoint, ends, and
# puts itself into the queue again: by itself SLURM does so where a machine failed or a job was preempted, and never
# where the time ran out. A run that failed, is done, or was cancelled (scancel) is not queued again.
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

# From SLURM 22.05 on srun takes no cpus-per-task over from sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-64}

told=
tell() {
  told=$1
  kill -TERM "$step" 2>/dev/null || true # srun passes it on to each torchrun
}
trap 'tell USR1' USR1
trap 'tell TERM' TERM

# A requeued job goes on from its newest checkpoint; where there is none, it starts. In the background, or bash
# would heed the signal only when all is over.
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

# Whatever the code is: torchrun, which was told to stop, ends with one of its own.
if [ -n "$told" ] && [ "$code" -ne 0 ]; then
  case $(scontrol show job "$SLURM_JOB_ID" 2>/dev/null || true) in
    *JobState=CANCELLED*) ;;
    *)
      echo "slurm.sh: interrupted by $told; job $SLURM_JOB_ID goes into the queue again"
      scontrol requeue "$SLURM_JOB_ID" || true # SLURM may have done it: a preempted job
      ;;
  esac
fi
exit "$code"
