#!/bin/bash
# Fetches Debian's Docker Engine and its containerd into DIR without installing or starting them:
# the comparison of bench and the docker client of e2e where the machine has none.
set -euo pipefail
mkdir -p "${1:?usage: docker-engine.sh DIR}"
dir=$(cd "$1" && pwd)
if [ -x "$dir/usr/sbin/dockerd" ] && [ -x "$dir/usr/bin/containerd" ]; then exit 0; fi
mkdir -p "$dir"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 0755 "$work"
cd "$work"
apt-get download docker.io containerd >/dev/null 2>&1 || { apt-get update -qq && apt-get download docker.io containerd >/dev/null; }
for package in ./*.deb; do dpkg -x "$package" "$dir"; done
