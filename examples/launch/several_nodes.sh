#!/usr/bin/env bash
# Several machines:  HOSTFILE=hostfile ./several_nodes.sh my.yaml [--key value ...]
#
#   HOSTFILE              "name slots=GPUS" a line, as DeepSpeed reads it (default: hostfile beside this script)
#   LAUNCHER=torchrun     (default) start this on every machine, with the same arguments
#   LAUNCHER=deepspeed    start this on one; it reaches the others by pdsh and ssh without a password
#   PORT=29501            if another run uses the port
#   RUN_ID=second         for torchrun, if another run uses the same machines: the same value on each machine
#
# All machines need the same packages, the same paths, and output_dir on a disk that they share.
#
# After a signal to stop, both launchers wait 30 seconds and then kill a process that is still saving a checkpoint.
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 makes torchrun wait longer. DeepSpeed's launcher has no such setting, so use
# torchrun if a step and a save take longer (docs/checkpoints.md).
set -euo pipefail
config=${1:?usage: several_nodes.sh CONFIG [--key value ...]}
shift
hostfile=${HOSTFILE:-$(dirname "$0")/hostfile}
port=${PORT:-29500}

case ${LAUNCHER:-torchrun} in
  torchrun)
    hosts=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$hostfile")
    head=$(awk 'NR == 1 {print $1}' <<<"$hosts")
    gpus=$(awk 'NR == 1 {sub(/.*slots=/, ""); print $1}' <<<"$hosts")  # the same on each
    exec torchrun --nnodes "$(wc -l <<<"$hosts")" --nproc_per_node "$gpus" \
      --rdzv_backend c10d --rdzv_endpoint "$head:$port" --rdzv_id "${RUN_ID:-vlcpt}" \
      -m vlcpt train "$config" "$@"
    ;;
  deepspeed)
    exec deepspeed --hostfile "$hostfile" --master_port "$port" --module vlcpt train "$config" "$@"
    ;;
  *) echo "LAUNCHER=$LAUNCHER: torchrun or deepspeed" >&2; exit 2 ;;
esac
