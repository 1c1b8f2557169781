#!/usr/bin/env bash
# Train on several machines. The same command on each of them, in any order, where the runs' folder (TRAINKIT_RUNS) and the
# data are the same on all, such as a network file system:
#
#   NODES=2 RENDEZVOUS=node0:29400 scripts/multi_node.sh model=M7B data=shards data.path=/data parallel=hsdp
#
# They meet at RENDEZVOUS, which is one of them (torchrun's c10d), and begin when there are NODES of them. NODES=1:4: any
# number from 1 to 4, and when one goes the others go on, as long as RENDEZVOUS is not the one that went. RESTARTS (3): how
# often all ranks are started again, from the newest checkpoint, when one was lost. Where a machine's name does not say
# where others reach it: ADDRESS, its own address, and IFACE, the network interface for gloo and NCCL.
set -euo pipefail
: "${NODES:?how many machines, such as NODES=2 or NODES=1:2}"
: "${RENDEZVOUS:?where they meet: HOST:PORT of one of them}"
if [ -n "${IFACE:-}" ]; then export GLOO_SOCKET_IFNAME="$IFACE" NCCL_SOCKET_IFNAME="$IFACE"; fi
exec "${TRAINKIT:-trainkit}" train "nproc=${NPROC:-auto}" "restarts=${RESTARTS:-3}" "nodes=$NODES" \
  "rendezvous=$RENDEZVOUS" ${ADDRESS:+"address=$ADDRESS"} parallel=auto "$@"
