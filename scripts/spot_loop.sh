#!/usr/bin/env bash
# Train on a machine that may be taken away: start, and start again whenever trainkit left because it was asked to, or was
# killed. Run this at boot (systemd, cron @reboot, a VM's startup script) with the arguments of `trainkit train`:
#
#   scripts/spot_loop.sh model=M350 data=shards data.path=/data checkpoint.mirror=s3://bucket/runs \
#       guard.notice=http://169.254.169.254/latest/meta-data/spot/instance-action guard.deadline_s=110
#
# `train` is idempotent: the same arguments go on from the newest checkpoint. On a machine with an empty disk and
# FETCH=s3://bucket/runs/NAME the run is brought here first. A stop of this script (SIGTERM) is handed to the run, which
# saves and leaves; the loop ends then.
set -uo pipefail
trainkit="${TRAINKIT:-trainkit}"
wait_s="${WAIT_S:-5}"   # before another start
most="${MOST:-100}"     # failures in a row that are none of a person's before the loop gives up
child=0 asked=0 failures=0
trap 'asked=1; [ "$child" -ne 0 ] && kill -TERM "$child" 2>/dev/null' TERM INT
runs="${TRAINKIT_RUNS:-runs}"

run() {
  "$trainkit" "$@" &
  child=$!
  wait "$child"; code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a trapped signal ends `wait` early
  child=0
}

if [ -n "${FETCH:-}" ] && [ ! -d "$runs/$(basename "$FETCH")" ]; then
  "$trainkit" checkpoint copy "$FETCH" "$runs" || echo "spot_loop: nothing to fetch from $FETCH yet" >&2
fi
while :; do
  run train "$@"
  case "$code" in
    0) exit 0 ;;
    2 | 70 | 74) echo "spot_loop: trainkit left with $code, which another start does not mend" >&2; exit "$code" ;;
    75) failures=0 ;;
    *) failures=$((failures + 1)) ;;
  esac
  [ "$asked" -eq 1 ] && exit 75
  if [ "$failures" -ge "$most" ]; then
    echo "spot_loop: $failures failures in a row, the last with $code" >&2
    exit "$code"
  fi
  echo "spot_loop: trainkit left with $code; starting it again in $wait_s s" >&2
  sleep "$wait_s"
done
