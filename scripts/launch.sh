#!/usr/bin/env bash
# Starts `chatglm_ptuning train` as one process or several; sourced by scripts/train_*.sh.
#
#   NUM_GPUS=4                     processes on this host, one a GPU (without GPUs: on the CPU)
#   HOSTFILE=hosts                 DeepSpeed's launcher over the hosts of a file with lines `host slots=4`;
#                                  started on one of them, which reaches the others by ssh. Without ssh:
#                                  start it on each with NODE_RANK=0, 1, ... and MASTER_ADDR=HOST
#   RENDEZVOUS=HOST:PORT           torchrun over NUM_HOSTS hosts: start it on each
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

launch() {
  local processes="${NUM_GPUS:-1}"
  if ! [[ "$processes" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NUM_GPUS must be a whole number over 0, got $processes" >&2
    exit 1
  fi
  setup
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > processes ? $(nproc) / processes : 1 ))}"
  if [ -n "${HOSTFILE:-}" ]; then
    if ! [ -f "$HOSTFILE" ]; then
      echo "error: HOSTFILE must be a file with lines \`host slots=4\`, got $HOSTFILE" >&2
      exit 1
    fi
    local hosts=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
    [ -z "${MASTER_ADDR:-}" ] || hosts+=(--master_addr "$MASTER_ADDR")
    [ -z "${NODE_RANK:-}" ] || hosts+=(--no_ssh --node_rank "$NODE_RANK")
    exec "$PYTHON" -m deepspeed.launcher.runner "${hosts[@]}" --no_local_rank --module chatglm_ptuning train "$@"
  elif [ -n "${RENDEZVOUS:-}" ]; then
    exec "$PYTHON" -m chatglm_ptuning.training.launch --nnodes "${NUM_HOSTS:?set NUM_HOSTS beside RENDEZVOUS}" \
      --nproc_per_node "$processes" --rdzv_id chatglm_ptuning --rdzv_backend c10d \
      --rdzv_endpoint "$RENDEZVOUS" -m chatglm_ptuning train "$@"
  elif [ "$processes" -gt 1 ]; then
    exec "$PYTHON" -m chatglm_ptuning.training.launch --standalone --nproc_per_node "$processes" \
      -m chatglm_ptuning train "$@"
  else
    exec "$PYTHON" -m chatglm_ptuning train "$@"
  fi
}
