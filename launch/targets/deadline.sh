# A reboot must not lose this script, nor the time when the machine has to end.
state=/var/lib/packhorse
per_boot=/var/lib/cloud/scripts/per-boot/packhorse # cloud-init runs it from the second boot on
mkdir -p "$state" "${per_boot%/*}"
[ -s "$state/deadline" ] || echo $((EPOCHSECONDS + limit)) >"$state/deadline"
[ -x "$per_boot" ] || install -m 755 "$0" "$per_boot"
deadline=$(<"$state/deadline")
left=$((${deadline:=$((EPOCHSECONDS + limit))} - EPOCHSECONDS))

# Set before anything else can go wrong; systemd keeps it even if this script dies. On shutdown the instance terminates.
shutdown -h "+$(((left > 0 ? left + 59 : 60) / 60))"
