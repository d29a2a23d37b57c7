#!/bin/bash
# Builds the example and its image: build.sh BIN writes BIN/hello and BIN/hello.tar.
set -euo pipefail
bin=$(realpath "$1")
cd "$(dirname "$0")/../.."
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$bin/hello" ./examples/hello
go run ./examples/hello/mkimage -tag skep.example/hello:1 -out "$bin/hello.tar" "$bin/hello"
