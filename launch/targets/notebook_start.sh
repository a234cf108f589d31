#!/usr/bin/env bash
# Runs, as root, whenever the notebook starts. Only the home directory survives a stop, so the rest is made anew each time.
set -euo pipefail

@SETTINGS@

# First the auto-stop, so that a failure below costs no more than the idle time. The notebook's user can't change its file.
cat >/usr/local/bin/stop-when-idle <<'PYTHON'
@IDLE@
PYTHON
systemd-run --unit stop-when-idle --on-active 5min --on-unit-active 5min --setenv "AWS_DEFAULT_REGION=$region" \
  python3 /usr/local/bin/stop-when-idle https://localhost:8443 /run/last-active "$name" "$idle_minutes"

# Today's code. Changes in a clone stay: then git pulls nothing.
code=/home/ec2-user/SageMaker/$directory
if [ -n "$repository" ]; then
  runuser -u ec2-user -- git -C "$code" pull --ff-only --quiet || echo "the clone was changed here, so it is left as it is"
elif [ "$(cat "$code/.source" 2>/dev/null)" != "$source_sha256" ]; then
  aws s3 cp --only-show-errors "$source_uri" /tmp/source.tar.gz
  echo "$source_sha256  /tmp/source.tar.gz" | sha256sum --check --quiet
  runuser -u ec2-user -- mkdir -p "$code"
  runuser -u ec2-user -- tar -xzf /tmp/source.tar.gz -C "$code"
  echo "$source_sha256" | runuser -u ec2-user -- tee "$code/.source" >/dev/null
fi

# The project needs Python 3.11, Amazon Linux comes with 3.9.
dnf install --assumeyes --quiet python3.12
# In the background, because SageMaker gives this script five minutes: `journalctl -u set-up` shows its log. A notebook has no GPU.
systemd-run --unit set-up --uid ec2-user --working-directory "/home/ec2-user/SageMaker/$directory" \
  --setenv PYTHON=python3.12 --setenv PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .ci/setup aws
