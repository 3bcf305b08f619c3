#!/usr/bin/env bash
# The GPUs of one machine:  ./one_node.sh my.yaml [--key value ...]
#
#   GPUS=4                how many (default: all). On a machine without a GPU, processes on the CPU:
#                         GPUS=2 ./one_node.sh my.yaml --use_cpu true
#   LAUNCHER=deepspeed    instead of torchrun; both start the same run
#   PORT=29501            for deepspeed, if another run uses the port; torchrun finds a free one
#
# Without --deepspeed (or the key in my.yaml) the processes use DDP, which suits LoRA and QLoRA that fit on one GPU.
# Otherwise --deepspeed zero2, or zero3 if the weights do not fit: see docs/scale.md.
#
# After a signal to stop, both launchers wait 30 seconds and then kill a process that is still saving a checkpoint.
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 makes torchrun wait longer. DeepSpeed's launcher has no such setting, so use
# torchrun if a step and a save take longer (docs/checkpoints.md).
set -euo pipefail
config=${1:?usage: one_node.sh CONFIG [--key value ...]}
shift

case ${LAUNCHER:-torchrun} in
  torchrun) exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" -m vlcpt train "$config" "$@" ;;
  deepspeed)
    exec deepspeed --num_gpus "${GPUS:--1}" --master_port "${PORT:-29500}" --module vlcpt train "$config" "$@"
    ;;
  *) echo "LAUNCHER=$LAUNCHER: torchrun or deepspeed" >&2; exit 2 ;;
esac
