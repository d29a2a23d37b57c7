#!/bin/bash
# Installs the Debian packages that building, running and testing Skep need and that are missing,
# and those of further COMMAND:PACKAGE arguments.
set -euo pipefail
missing=()
need() { # command package
	command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing+=("$2")
}
need git git
need crun crun
need runc runc
need ip iproute2
need ps procps
need busybox busybox-static
need curl curl
for more in "$@"; do need "${more%%:*}" "${more##*:}"; done
if [ "${#missing[@]}" -eq 0 ]; then exit 0; fi
echo "installing: ${missing[*]}"
if [ "$(id -u)" -ne 0 ]; then echo "run as root, or install these packages yourself" >&2; exit 1; fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
