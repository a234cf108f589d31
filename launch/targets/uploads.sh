# What travels between a run's directory and the bucket. Uses scratch, directory, s3_run and log of the script that it is part of.
not_output=(--exclude 'checkpoints/*' --exclude '.*' --exclude '*/.*') # hidden files are locks, and what is not complete yet
uploaded=''

# Makes the run's directory, with what earlier attempts have saved.
restore() {
  mkdir -p "$scratch/restored/checkpoints"
  # Without what says that the run is complete: who asks for one more attempt wants it tested and packaged again.
  aws s3 sync --only-show-errors "$s3_run/output" "$scratch/restored" --exclude result.json --exclude model.tar.gz || return
  aws s3 sync --only-show-errors "$s3_run/checkpoints" "$scratch/restored/checkpoints" || return
  for checkpoint in "$scratch"/restored/checkpoints/*/; do # manifests are uploaded last: where there is none, the upload was cut short
    [ -f "$checkpoint/manifest.json" ] || rm -rf "$checkpoint"
  done
  mv "$scratch/restored" "$directory" # from here on uploads may begin: they delete what the directory doesn't hold
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
