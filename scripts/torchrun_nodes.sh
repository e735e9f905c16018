#!/usr/bin/env bash
# One machine's part of a run on several: the same line on each of them, with a NODE_RANK of its own (docs/CLUSTER.md).
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/torchrun_nodes.sh train_gpt2.py --preset 124M --auto_resume
#   NNODES=1:4 NODE_RANK=0 MASTER_ADDR=10.0.0.1 RDZV=c10d scripts/torchrun_nodes.sh finetune_dolly.py --auto_resume
#
# static: the machines are given, and a failure ends the run. c10d: after a failure whoever is there goes on together.
set -euo pipefail

: "${NNODES:?how many machines; with RDZV=c10d also LEAST:MOST}"
: "${MASTER_ADDR:?name or address of the machine with NODE_RANK 0, as the others reach it}"
: "${MASTER_PORT:=29500}"
: "${NPROC:=auto}"              # processes on this machine: a number, or one for each GPU
: "${RDZV:=static}"             # static or c10d
: "${NODE_RANK:=${SLURM_NODEID:-}}" # 0 for MASTER_ADDR; the others 1, 2, ...; with c10d any number but 0
: "${IFNAME:=}"                 # network interface to use, where the machine has several
: "${PYTHON:=python}"
# c10d only
: "${JOB_ID:=espalier}"         # the same on all machines of a run
: "${MAX_RESTARTS:=100}"        # one failure may use several
: "${LOCAL_ADDR:=}"             # this machine's address, where its name does not resolve
: "${JOIN_TIMEOUT:=600}"        # seconds to wait for the least number of machines
: "${LAST_CALL:=30}"            # seconds to wait for more, once that many are there

here="$(cd "$(dirname "$0")/.." && pwd)"
if [ -n "$IFNAME" ]; then
  export GLOO_SOCKET_IFNAME="$IFNAME" NCCL_SOCKET_IFNAME="$IFNAME"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # what torchrun sets too, and says so in six lines

case "$RDZV" in
static)
  : "${NODE_RANK:?0 for MASTER_ADDR, 1, 2, ... for the others}"
  meet=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  ;;
c10d)
  # Else a machine that had rank 0 and comes back with another keeps sending its processes to its own store (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # A machine whose death shows in no closed connection is given up after 3 times 5 seconds.
  conf="join_timeout=$JOIN_TIMEOUT,last_call_timeout=$LAST_CALL,keep_alive_interval=5,keep_alive_max_attempt=3"
  case "$NODE_RANK" in # who keeps the list of machines: torchrun's own guess fails where names do not resolve
  "") ;;
  0) conf="$conf,is_host=true" ;;
  *) conf="$conf,is_host=false" ;;
  esac
  meet=(--rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv_id "$JOB_ID" --rdzv_conf "$conf")
  meet+=(--max-restarts "$MAX_RESTARTS")
  if [ -n "$LOCAL_ADDR" ]; then
    meet+=(--local_addr "$LOCAL_ADDR")
  fi
  ;;
*)
  echo "error: RDZV=$RDZV: expected static or c10d" >&2
  exit 2
  ;;
esac

script="${1:?a script, train_gpt2.py or finetune_dolly.py, and its flags}"
shift
exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$NPROC" "${meet[@]}" "$here/$script" "$@"
