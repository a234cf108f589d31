#!/usr/bin/env bash
# Trains one run on this instance and terminates the instance, whatever happens. Runs as root at the first boot; launch/ec2.py fills in the settings.
set -uo pipefail

@SETTINGS@

# Armed before anything can go wrong, and kept by systemd even if this script dies. On shutdown the instance terminates.
shutdown -h "+$(((limit + 59) / 60))"

scratch=/opt/dlami/nvme # as in conf/platform/ec2.yaml
directory=$scratch/runs/$run
log=/var/log/packhorse.log
s3_run=$bucket/runs/$run
not_output=(--exclude 'checkpoints/*' --exclude '.*' --exclude '*/.*') # hidden files are locks, and what is not complete yet

job='' code=1 reason='' kill_at='' uploaded=''
export AWS_DEFAULT_REGION=$region PYTHONUNBUFFERED=1

say() { echo "$(date -u +%FT%TZ) $*" >>"$log"; }

fetch_and_train() {
  set -e
  # The AMI formats and mounts the NVMe disk itself. Where there is none, the same directories lie on the root disk.
  waited=0
  until mountpoint -q "$scratch" || ((waited++ == 60)); do sleep 1; done
  mountpoint -q "$scratch" || say "no disk is mounted at $scratch: using the root disk"
  mkdir -p "$scratch/source" "$scratch/runs" "$scratch/restored/checkpoints"

  say "fetching the code"
  aws s3 cp --only-show-errors "$bucket/source/$source_sha256.tar.gz" "$scratch/source.tar.gz"
  echo "$source_sha256  $scratch/source.tar.gz" | sha256sum --check --quiet
  tar -xzf "$scratch/source.tar.gz" -C "$scratch/source" --no-same-owner
  if [ -n "$data" ]; then
    say "fetching the pictures"
    aws s3 sync --only-show-errors "$bucket/data/$data" "$data_root"
  fi
  say "fetching what earlier attempts have saved"
  aws s3 sync --only-show-errors "$s3_run/output" "$scratch/restored"
  aws s3 sync --only-show-errors "$s3_run/checkpoints" "$scratch/restored/checkpoints"
  for checkpoint in "$scratch"/restored/checkpoints/*/; do # manifests are uploaded last: where there is none, the upload was cut short
    [ -f "$checkpoint/manifest.json" ] || rm -rf "$checkpoint"
  done
  mv "$scratch/restored" "$directory" # from here on uploads may begin: they delete what the directory doesn't hold

  cd "$scratch/source"
  say "setting up"
  .ci/setup "$extras"
  say "training"
  exec .venv/bin/python -m trainer "${arguments[@]}"
}

upload() {
  if [ -d "$directory" ]; then
    upload_checkpoints
    aws s3 sync --only-show-errors "$directory" "$s3_run/output" "${not_output[@]}" --exclude result.json
    # The result says that the run is complete, so it comes after everything else.
    [ ! -f "$directory/result.json" ] || aws s3 cp --only-show-errors "$directory/result.json" "$s3_run/output/result.json"
  fi
  aws s3 cp --only-show-errors "$log" "$s3_run/log.txt"
}

# From hard links, so that the trainer may delete meanwhile. Manifests come last, and nothing is deleted before what replaces it is there.
upload_checkpoints() {
  local names staged=$scratch/staged
  names=$(cd "$directory/checkpoints" && echo *)
  [ "$names" != '*' ] && [ "$names" != "$uploaded" ] || return 0
  rm -rf "$staged" && mkdir "$staged" && cp -al "$directory"/checkpoints/* "$staged" &&
    aws s3 sync --only-show-errors "$staged" "$s3_run/checkpoints" --exclude '*/manifest.json' &&
    aws s3 sync --only-show-errors "$staged" "$s3_run/checkpoints" &&
    aws s3 sync --only-show-errors "$staged" "$s3_run/checkpoints" --delete &&
    uploaded=$names
}

# Asks the job to save and end; where it has not ended after half of the grace period, it is killed.
stop() {
  [ -z "$reason" ] || return 0
  reason=$1 kill_at=$((SECONDS + grace / 2))
  say "stopping: $reason"
  kill -TERM -- "-$job"
}

finish() {
  trap '' TERM
  case $code in
    0) reason='done' ;;
    75) reason=${reason:-interrupted} ;; # by a spot notice: the log says which
    *) reason=${reason:-failed} ;;
  esac
  say "attempt $attempt ended: $reason, exit code $code"
  upload >>"$log" 2>&1
  printf '{"attempt": %d, "code": %d, "reason": "%s"}\n' "$attempt" "$code" "$reason" | aws s3 cp - "$s3_run/attempts/$attempt.json"
  tail -n 50 "$log" # to the instance's console, should S3 be out of reach
  shutdown -h now
}
trap finish EXIT

aws s3 cp --only-show-errors "$s3_run/log.txt" "$log" 2>/dev/null # the log of earlier attempts, where there is one, comes first
say "attempt $attempt at run $run, ends at the latest in $limit seconds"
set -m # the job gets a process group of its own
fetch_and_train >>"$log" 2>&1 &
job=$!
trap 'stop SIGTERM' TERM

upload_at=0
while kill -0 "$job" 2>/dev/null; do
  if ((SECONDS >= limit - grace)); then
    stop 'time limit'
  elif ((SECONDS >= upload_at)); then
    upload >>"$log" 2>&1
    if aws s3 ls "$s3_run/attempts/$attempt.stop" >/dev/null; then stop 'asked to stop'; fi
    upload_at=$((SECONDS + every))
  fi
  [ -z "$kill_at" ] || ((SECONDS < kill_at)) || kill -KILL -- "-$job"
  sleep 2 &
  wait $! # a signal interrupts `wait`, and waits for the end of a plain `sleep`
done
wait "$job"
code=$?
