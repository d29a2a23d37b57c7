#!/bin/bash
# From built programs to a running, published service: up.sh BIN [flags of skep up…].
set -euo pipefail
bin=$(realpath "$1")
shift
here=$(realpath "$(dirname "$0")")
export HELLO_PORT=${HELLO_PORT:-8080}
"$bin/skep" up "$@"
unset SKEP_HOST DOCKER_HOST
export DOCKER_CONTEXT=skep # the node that is now up, wherever its socket is
"$bin/skep" deploy --load "$bin/hello.tar" --wait "$here/compose.yaml"
url="http://127.0.0.1:$HELLO_PORT/"
for _ in $(seq 50); do
	if answer=$(curl -fsS --max-time 2 "$url" 2>/dev/null); then break; fi
	sleep 0.2
done
if [ -z "${answer:-}" ]; then
	echo "nothing answers at $url; look with: $bin/skep status; $bin/skep logs hello_web" >&2
	exit 1
fi
skep="$bin/skep"
if [ "$bin" = "$PWD/bin" ]; then skep=bin/skep; fi
try() { printf '  %-42s %s\n' "$1" "$2"; }
printf '\n$ curl %s\n%s\n\nA swarm of one node runs two services. Try next:\n\n' "$url" "$answer"
try "$skep status" "what runs, what does not, and why"
try "$skep logs -f hello_ticker" "what the tasks write"
try "$skep scale hello_ticker=5" "more of them"
try "$skep scale hello_web=2 -d" "two tasks, one port: one has to wait"
try "$skep explain hello_web" "and this says why"
try "docker --context skep service ls" "the same swarm with docker's own client"
try "$skep token" "add another machine"
try "$skep dev up --managers 3" "a swarm of five nodes on this machine"
try "$skep rm hello" "remove the two services"
try "$skep down" "stop the node; its data stay"
