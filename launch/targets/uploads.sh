# Copies files between a run's directory and the bucket. Uses scratch, directory, s3_run and log of the script that it is part of.
not_output=(--exclude 'checkpoints/*' --exclude '.*' --exclude '*/.*') # hidden files are locks, and incomplete files
uploaded=''

# Makes the run's directory, with the files that earlier attempts have saved.
restore() {
  mkdir -p "$scratch/restored/checkpoints"
  # Without the files that mark a complete run: another attempt is to test and package it again.
  aws s3 sync --only-show-errors "$s3_run/output" "$scratch/restored" --exclude result.json --exclude model.tar.gz || return
  aws s3 sync --only-show-errors "$s3_run/checkpoints" "$scratch/restored/checkpoints" || return
  for checkpoint in "$scratch"/restored/checkpoints/*/; do # manifests are uploaded last: without one, the upload was cut short
    [ -f "$checkpoint/manifest.json" ] || rm -rf "$checkpoint"
  done
  mv "$scratch/restored" "$directory" # only now may uploads begin: they delete what the directory doesn't hold
}

upload() {
  if [ -d "$directory" ]; then
    upload_checkpoints
    aws s3 sync --only-show-errors "$directory" "$s3_run/output" "${not_output[@]}" --exclude result.json
    # The result marks the run as complete, so it comes after everything else.
    [ ! -f "$directory/result.json" ] || aws s3 cp --only-show-errors "$directory/result.json" "$s3_run/output/result.json"
  fi
  aws s3 cp --only-show-errors "$log" "$s3_run/log.txt"
}

# From hard links, so that the trainer may delete files meanwhile. Manifests come last; old checkpoints are deleted when the new ones are there.
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
