#!/usr/bin/env bash
# One GPU:  ./one_gpu.sh my.yaml [--key value ...]
#
#   GPU=1                another than the first
#   LAUNCHER=torchrun    or deepspeed. DeepSpeed works only in a process that a launcher started, also if it is
#                        the only one:  LAUNCHER=torchrun ./one_gpu.sh my.yaml --deepspeed zero2_offload
#   PORT=29501           for deepspeed, where another run has the port; torchrun finds a free one
#
# Told to stop, both launchers kill what is still saving a checkpoint after 30 seconds. Of torchrun that can be
# changed: TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240; of deepspeed it cannot, so take torchrun where a step and a save take
# longer (docs/checkpoints.md).
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
