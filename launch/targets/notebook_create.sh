#!/usr/bin/env bash
# Runs once, as root, when the notebook is created: puts the project into its home directory, which survives a stop.
set -euo pipefail

@SETTINGS@

cd /home/ec2-user/SageMaker
if [ -n "$repository" ]; then
  runuser -u ec2-user -- git clone --depth 1 -- "$repository" "$directory"
else
  aws s3 cp --only-show-errors "$source_uri" /tmp/source.tar.gz
  echo "$source_sha256  /tmp/source.tar.gz" | sha256sum --check --quiet
  runuser -u ec2-user -- mkdir "$directory"
  runuser -u ec2-user -- tar -xzf /tmp/source.tar.gz -C "$directory"
  echo "$source_sha256" | runuser -u ec2-user -- tee "$directory/.source" >/dev/null
fi
