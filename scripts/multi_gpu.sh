#!/usr/bin/env bash
# Train on all GPUs of this machine (on its cores, where there is none):
#
#   scripts/multi_gpu.sh model=M1B data=shards data.path=/data parallel=fsdp
#
# It is `trainkit train nproc=auto` with restarts: torchrun starts a rank for each GPU, and all of them again, from the newest
# checkpoint, when one was lost (RESTARTS, 3). SIGTERM and Ctrl-C save and leave with 75; the same command goes on. The
# words of ranks other than the first are in the run's folder, logs/rank-N.log.
set -euo pipefail
exec "${TRAINKIT:-trainkit}" train "nproc=${NPROC:-auto}" "restarts=${RESTARTS:-3}" parallel=auto "$@"
