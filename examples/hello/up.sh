#!/bin/bash
# From built programs to a running, published service: up.sh BIN [flags of skep up…].
set -euo pipefail
bin=$(realpath "$1")
shift
here=$(realpath "$(dirname "$0")")
export HELLO_PORT=${HELLO_PORT:-8080}
"$bin/skep" up "$@"
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
cat <<END

\$ curl $url
$answer

A swarm of one node runs two services. Try next:

  $bin/skep status                        what runs, what does not, and why
  $bin/skep logs -f hello_ticker          what the tasks write
  $bin/skep scale hello_ticker=5          more of them
  $bin/skep scale hello_web=2             one port, two tasks: then skep explain hello_web
  docker --context skep service ls        the same swarm, with docker's own client
  $bin/skep token                         add another machine
  $bin/skep dev up --managers 3           a swarm of five nodes on this machine
  $bin/skep rm hello; $bin/skep down      take it all down again
END
