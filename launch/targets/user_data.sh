#!/usr/bin/env bash
# Trains one run on this instance and terminates the instance, whatever happens. Runs as root at each boot; launch/targets/ec2_request.py fills in the settings.
set -uo pipefail
trap '' HUP # a shell that ends, in which someone started this by hand, ends nothing; the trainer inherits this

@SETTINGS@

@DEADLINE@

@UPLOADS@

# Prints a value of this machine from EC2's metadata service, by name.
meta() {
  local metadata=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}/latest token
  token=$(curl -sf -m 2 --noproxy '*' -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token") || return 1
  curl -sf -m 2 --noproxy '*' -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/$1"
}

# A reboot must not lose the machine's id either.
[ -s "$state/machine" ] || cat /var/lib/cloud/data/instance-id >"$state/machine" 2>/dev/null || cat /proc/sys/kernel/random/uuid >"$state/machine"

scratch=/opt/dlami/nvme # as in conf/platform/ec2.yaml
directory=$scratch/runs/$run
log=/var/log/packhorse.log
s3_run=$bucket/runs/$run
job='' code=1 reason='' kill_at='' notes='' other='' lost_at='' index=0 group='' host='' word=json
export AWS_DEFAULT_REGION=$region PYTHONUNBUFFERED=1 PACKHORSE_REVISION=$revision

say() { echo "$(date -u +%FT%TZ) $*" >>"$log"; }

# Finds which of several machines this is: the first one, 0, has the run; the others write their own messages. Its claim tells them its request and its address.
count() {
  until index=$(meta ami-launch-index) && group=$(meta reservation-id) && host=$(meta local-ipv4); do
    ((SECONDS < 300)) || return 1
    sleep 2
  done
  grep -q ' ' "$state/machine" || echo "$(<"$state/machine") $group $host" >"$state/machine"
  ((index == 0)) || word=$index.json
}

# A run has one machine, or the machines of one request: of its newest attempt, and the first that claims that. Any other machine writes nothing and ends.
claim() {
  local note=attempts/$attempt.machine owner
  ((index > 0)) || aws s3api put-object --bucket "${bucket#s3://}" --key "runs/$run/$note" --if-none-match '*' --body "$state/machine" >/dev/null 2>&1
  until owner=$(aws s3 cp --only-show-errors "$s3_run/$note" - 2>>"$log"); do
    ((index > 0 && SECONDS < 900)) || return 1 # the first machine may come up later
    sleep 5
  done
  host=${owner##* }
  if ((index > 0)) && [[ $owner == *" $group "* ]]; then return; fi
  [ "$owner" = "$(<"$state/machine")" ] || other='another machine has this attempt'
}

# Lists the notes of all attempts. Sets `other` where this machine no longer has the run.
look() {
  local newest
  notes=$(aws s3 ls "$s3_run/attempts/" 2>>"$log") || return 1
  newest=$(sed -n 's/.* \([0-9]*\)\.request\.json$/\1/p' <<<"$notes" | sort -n | tail -n 1)
  [ "${newest:-0}" -le "$attempt" ] || other="attempt $newest has taken over"
}

noted() { grep -q " $attempt\.$1\$" <<<"$notes"; }

# Whether another one of several machines has ended without success.
alone() {
  local note
  while read -r note; do
    [ "$note" != "$attempt.$word" ] || continue
    aws s3 cp --only-show-errors "$s3_run/attempts/$note" - 2>>"$log" | grep -q '"code": 0,' || return 0
  done < <(grep -oE " $attempt(\.[0-9]+)?\.json$" <<<"$notes")
  return 1
}

fetch_and_train() {
  set -e
  # The AMI formats and mounts the NVMe disk itself; without one, this is the root disk.
  waited=0
  until mountpoint -q "$scratch" || ((waited++ == 60)); do sleep 1; done
  mountpoint -q "$scratch" || say "no disk is mounted at $scratch: using the root disk"
  mkdir -p "$scratch/source" "$scratch/runs"

  say "fetching the code"
  aws s3 cp --only-show-errors "$bucket/source/$source_sha256.tar.gz" "$scratch/source.tar.gz"
  echo "$source_sha256  $scratch/source.tar.gz" | sha256sum --check --quiet
  tar -xzf "$scratch/source.tar.gz" -C "$scratch/source" --no-same-owner
  if [ -n "$data" ]; then
    say "fetching the pictures"
    aws s3 sync --only-show-errors "$data" "$data_root"
  fi
  if [ -n "$weights" ]; then
    say "fetching the weights"
    aws s3 sync --only-show-errors "$bucket/data/$weights" "$weights_root"
  fi
  [ -z "$wheels" ] || aws s3 sync --only-show-errors "$bucket/data/$wheels" "$scratch/wheels"
  if ((index == 0)) && [ ! -d "$directory" ]; then # after a reboot the directory is there, and newer
    say "fetching what earlier attempts have saved"
    restore
  fi

  cd "$scratch/source"
  say "setting up"
  PACKHORSE_WHEELS=${wheels:+$scratch/wheels} .ci/setup "$extras"
  touch "$scratch/training"
  processes=${processes:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
  processes=$((processes > 0 ? processes : 1))
  together=(--standalone)
  if ((instances > 1)); then
    say "training on $instances machines, of which this is number $((index + 1)); processes on each: $processes"
    together=(--nnodes="$instances" --node_rank="$index" --master_addr="$host" --master_port=29500)
  elif ((processes == 1)); then
    say "training"
    exec .venv/bin/python -m trainer "${arguments[@]}"
  else
    say "training in $processes processes"
  fi
  exec .venv/bin/python -m trainer.distributed.torchrun "${together[@]}" --nproc_per_node="$processes" -m trainer "${arguments[@]}"
}

# Whether the training has logged nothing for too long. It logs its progress every 15 seconds.
idles() {
  local began newest
  ((idle > 0 && index == 0)) && began=$(stat -c %Y "$scratch/training" 2>/dev/null) && ((began >= booted)) || return 1
  newest=$(stat -c %Y "$directory/log.txt" 2>/dev/null || echo 0)
  ((EPOCHSECONDS - (newest > began ? newest : began) > idle))
}

# Asks the job to save and end; a job that has not ended after half of the grace period is killed.
stop() {
  [ -z "$reason" ] || return 0
  reason=$1 kill_at=$((SECONDS + grace / 2))
  say "stopping: $reason"
  kill -TERM -- "-$job"
}

# Whether AWS is about to take this machine back.
spot_notice() {
  meta spot/instance-action >/dev/null || meta events/recommendations/rebalance >/dev/null
}

# The first machine saves the run; the others save only their log.
save() {
  if ((index == 0)); then upload; else aws s3 cp --only-show-errors "$log" "$s3_run/log.$index.txt"; fi
}

# Notes how the attempt ended, also in the name of an object: a listing of all runs reads no objects.
last_word() {
  local said
  said=$(printf '{"attempt": %d, "code": %d, "reason": "%s"}' "$attempt" "$code" "$reason")
  aws s3 cp - "$s3_run/attempts/$attempt.$word" <<<"$said"
  ((index > 0)) || aws s3 cp - "$bucket/$ends$run/$attempt.end.$(base64 -w0 <<<"$said" | tr '+/' '-_')" </dev/null
}

rebooting() { systemctl list-jobs 2>/dev/null | grep -q 'reboot\.target'; }

finish() {
  trap '' TERM
  case $code/$reason in
    0/*) reason='done' ;;
    75/ | */SIGTERM) # interrupted by itself, or by the system
      if spot_notice; then reason='spot notice'; fi
      reason=${reason:-interrupted}
      ;;
    *) reason=${reason:-failed} ;;
  esac
  say "attempt $attempt ended: $reason, exit code $code"
  look
  if [ -n "$other" ]; then
    say "$other: this machine leaves the run alone"
  else
    save >>"$log" 2>&1
    rebooting || last_word # after a reboot the attempt goes on
  fi
  tail -n 50 "$log" # to the instance's console, in case S3 is out of reach
  rebooting || shutdown -h now
}
trap finish EXIT

# The log of earlier attempts, if any, comes first; after a reboot it is on the disk already.
((instances == 1)) || count || other='the metadata service does not say which of the machines this is'
[ -z "$other" ] || exit
((index > 0)) || [ -f "$log" ] || aws s3 cp --only-show-errors "$s3_run/log.txt" "$log" 2>/dev/null
say "attempt $attempt at run $run, ends at the latest in $left seconds"
if ! claim || ! look; then exit; fi # the bucket is out of reach
if [ -z "$other" ] && { noted json || noted "$word"; }; then other='this attempt has ended before'; fi
[ -z "$other" ] || exit
if ((left <= 0)); then
  code=75 reason='time limit'
  exit
fi
set -m # the job gets its own process group
fetch_and_train >>"$log" 2>&1 &
job=$!
trap 'stop SIGTERM' TERM

booted=$EPOCHSECONDS upload_at=0
while kill -0 "$job" 2>/dev/null; do
  if ((EPOCHSECONDS >= deadline - grace)); then
    stop 'time limit'
  elif idles; then
    stop 'idle'
  elif ((SECONDS >= upload_at)); then
    look
    if [ -n "$other" ]; then
      stop "$other"
    else
      save >>"$log" 2>&1
      if noted stop; then stop 'asked to stop'; fi
      # A training machine notices itself that another one is gone, and saves; unless it still waits for it, or hangs.
      if ((instances > 1)) && alone; then
        lost_at=${lost_at:-$SECONDS}
        if [ ! -f "$scratch/training" ] || ((SECONDS > lost_at + 900)); then stop 'another machine has ended'; fi
      fi
    fi
    upload_at=$((SECONDS + every))
  fi
  [ -z "$kill_at" ] || ((SECONDS < kill_at)) || kill -KILL -- "-$job"
  sleep 2 &
  wait $! # a signal interrupts `wait`, but not a plain `sleep`
done
wait "$job"
code=$?
