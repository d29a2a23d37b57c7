#!/bin/sh
# Builds what lies beside bin/skep: build.sh OUTDIR
#   containerd                 the pinned server, static
#   containerd-shim-skep-v1    our shim, static
#   skep-init                  the init process of containers that ask for one, static
# containerd is skipped when it is newer than this directory's go.mod.
set -eu
out=$(mkdir -p "${1:?usage: build.sh OUTDIR}" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
GO=${GO:-go}
export CGO_ENABLED=0
tags="no_cri no_btrfs no_zfs no_devmapper no_tracing no_systemd no_aufs no_dynamic_plugins"
version=$(cd "$here" && $GO list -m -f '{{.Version}}' github.com/containerd/containerd/v2)
if [ ! -x "$out/containerd" ] || [ "$here/go.mod" -nt "$out/containerd" ]; then
	(cd "$here" && $GO build -trimpath -tags "$tags" \
		-ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$version -X github.com/containerd/containerd/v2/version.Package=github.com/containerd/containerd/v2" \
		-o "$out/containerd" github.com/containerd/containerd/v2/cmd/containerd)
fi
cd "$root"
$GO build -trimpath -tags "$tags" -ldflags "-s -w" -o "$out/containerd-shim-skep-v1" ./cmd/containerd-shim-skep-v1
$GO build -trimpath -ldflags "-s -w" -o "$out/skep-init" ./cmd/skep-init
