#!/bin/bash
# Fetches Debian's kernel for virtual machines into DIR without installing it: the guest in which
# e2e runs what the machine's own kernel cannot do.
set -euo pipefail
mkdir -p "${1:?usage: guest-kernel.sh DIR}"
dir=$(cd "$1" && pwd)
if [ -s "$dir/vmlinuz" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 0755 "$work"
cd "$work"
package() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}'; }
[ -n "$(package)" ] || apt-get update -qq
apt-get download "$(package)" >/dev/null 2>&1 || { apt-get update -qq && apt-get download "$(package)" >/dev/null; }
dpkg -x ./*.deb root
rm -rf "$dir/modules"
mv root/lib/modules "$dir/modules"
mv root/boot/vmlinuz-* "$dir/vmlinuz"
