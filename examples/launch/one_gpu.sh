#!/usr/bin/env bash
# One GPU:  ./one_gpu.sh my.yaml [--key value ...]
#
#   GPU=1                the GPU's number (default: 0)
#   LAUNCHER=torchrun    or deepspeed. DeepSpeed needs a process that a launcher started, even for a single
#                        process:  LAUNCHER=torchrun ./one_gpu.sh my.yaml --deepspeed zero2_offload
#   PORT=29501           for deepspeed, if another run uses the port; torchrun finds a free one
#
# After a signal to stop, both launchers wait 30 seconds and then kill a process that is still saving a checkpoint.
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 makes torchrun wait longer. DeepSpeed's launcher has no such setting, so use
# torchrun if a step and a save take longer (docs/checkpoints.md).
set -euo pipefail
config=${1:?usage: one_gpu.sh CONFIG [--key value ...]}
shift
gpu=${GPU:-0}

case ${LAUNCHER:-none} in
  none) CUDA_VISIBLE_DEVICES=$gpu exec vlcpt train "$config" "$@" ;;
  torchrun)
    CUDA_VISIBLE_DEVICES=$gpu exec torchrun --standalone --nproc_per_node 1 -m vlcpt train "$config" "$@"
    ;;
  deepspeed)
    exec deepspeed --include "localhost:$gpu" --master_port "${PORT:-29500}" --module vlcpt train "$config" "$@"
    ;;
  *) echo "LAUNCHER=$LAUNCHER: none, torchrun or deepspeed" >&2; exit 2 ;;
esac
