#!/bin/sh
# Generates api/*.pb.go from api/proto with the pinned generators, and the committed descriptor set.
# raft.proto is read from the etcd raft module that go.mod pins, never copied into this repository.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/src"
for tool in buf protoc-gen-go protoc-gen-go-grpc; do
	path=$(sed -n 's/^tool //p' "tools/$tool/go.mod")
	(cd "tools/$tool" && go build -o "$work/bin/$tool" "$path")
done
cp -r api/proto/. "$work/src/"
install -m 0644 "$(go list -m -f '{{.Dir}}' go.etcd.io/raft/v3)/raftpb/raft.proto" "$work/src/raft.proto"
cat >"$work/buf.yaml" <<YAML
version: v2
modules:
  - path: src
YAML
cat >"$work/buf.gen.yaml" <<YAML
version: v2
plugins:
  - local: $work/bin/protoc-gen-go
    out: out
    opt: [module=github.com/skep-dev/skep]
  - local: $work/bin/protoc-gen-go-grpc
    out: out
    opt: [module=github.com/skep-dev/skep]
inputs:
  - directory: src
    exclude_paths: [src/raft.proto]
YAML
cd "$work" && bin/buf generate && cd - >/dev/null
rm -f api/*.pb.go api/skepv1/*.pb.go api/networkdb/*.pb.go
cp -r "$work/out/api/." api/
