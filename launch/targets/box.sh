#!/usr/bin/env bash
# A machine with a shell: it ends itself at its time limit, even after a reboot. Runs as root at each boot; launch/targets/box.py fills in the settings.
set -uo pipefail

@SETTINGS@

@DEADLINE@

# The code of the user's checkout, in the home directory of Session Manager's user.
home=/home/ssm-user
id ssm-user >/dev/null 2>&1 || useradd --create-home ssm-user
if [ ! -d "$home/$project" ]; then
  aws s3 cp --only-show-errors "$bucket/source/$source_sha256.tar.gz" /tmp/source.tar.gz --region "$region" &&
    echo "$source_sha256  /tmp/source.tar.gz" | sha256sum --check --quiet &&
    mkdir -p "$home/$project" && tar -xzf /tmp/source.tar.gz -C "$home/$project" --no-same-owner &&
    chown -R ssm-user: "$home/$project"
fi
