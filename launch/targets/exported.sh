#!/usr/bin/env bash
# Trains one run on a machine that another engine has rented; launch/exports.py fills in the settings.
set -uo pipefail

@SETTINGS@

@UPLOADS@

directory=$scratch/runs/$run
log=$scratch/packhorse.log
s3_run=$bucket/runs/$run
export AWS_DEFAULT_REGION=$region PYTHONUNBUFFERED=1 PACKHORSE_REVISION=$revision

get() {
  mkdir -p "$scratch/source" "$scratch/runs"
  command -v aws >/dev/null || python3 -m pip install --quiet awscli || return
  aws s3 cp --only-show-errors "$bucket/source/$source_sha256.tar.gz" "$scratch/source.tar.gz" || return
  echo "$source_sha256  $scratch/source.tar.gz" | sha256sum --check --quiet || return
  tar -xzf "$scratch/source.tar.gz" -C "$scratch/source" --no-same-owner || return
  [ -z "$data" ] || aws s3 sync --only-show-errors "$data" "$data_root" || return
  [ -z "$weights" ] || aws s3 sync --only-show-errors "$bucket/data/$weights" "$weights_root" || return
  [ -z "$wheels" ] || aws s3 sync --only-show-errors "$bucket/data/$wheels" "$scratch/wheels" || return
  [ -d "$directory" ] || restore || return
  cd "$scratch/source" && PACKHORSE_WHEELS=${wheels:+$scratch/wheels} .ci/setup "$extras"
}

# Earlier machines of this run have used some of its time.
spent() { aws s3 cp --only-show-errors "$s3_run/exported.seconds" - 2>/dev/null || echo 0; }
note() { echo $((used + SECONDS)) | aws s3 cp --only-show-errors - "$s3_run/exported.seconds"; }

get || exit 1
used=$(spent)
left=$((limit - used - SECONDS))
if ((left <= 0)); then
  echo "run $run has used up its $limit seconds, the ceiling of all its machines"
  exit 1
fi
processes=${processes:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
set -m # the training gets its own process group
# Before the limit the training gets SIGTERM, saves and ends; where it doesn't end, it is killed.
timeout --preserve-status --kill-after="$grace" "$((left > grace ? left - grace : left))" \
  .venv/bin/python -m trainer.distributed.torchrun --standalone --nproc_per_node="$((processes > 0 ? processes : 1))" \
  -m trainer "${arguments[@]}" > >(tee -a "$log") 2>&1 &
job=$!
trap 'kill -TERM "$job" 2>/dev/null' TERM INT
at=0
while kill -0 "$job" 2>/dev/null; do
  if ((SECONDS >= at)); then
    upload
    note
    at=$((SECONDS + every))
  fi
  sleep 2 &
  wait $!
done
wait "$job"
code=$?
upload
note
if ((code != 0 && used + SECONDS >= limit - grace)); then
  echo "run $run has reached its limit of $limit seconds; it is saved, and not started again"
  exit 1
fi
exit "$code"
