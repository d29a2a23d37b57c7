#!/bin/bash
# Runs every fuzz target of the module, or of the packages below DIR, for TIME each. All
# are run, whatever fails; what failed is listed in the end.
#   tools/fuzz.sh TIME [DIR]
# FUZZ_WRAP is put before each run: FUZZ_WRAP='nice -n 10' is friendly to others.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?how long each target runs, such as 20s}
out=$(mktemp)
trap 'rm -f "$out"' EXIT
failed=()
count=0
# run fuzzes one target. When the time is up while a worker is busy, go test may fail with
# "context deadline exceeded" and nothing else (golang.org/issue/75804): no failure of ours.
run() {
	# shellcheck disable=SC2086 # the wrapper may have arguments
	${FUZZ_WRAP:-} go test -run '^$' -fuzz "^$2\$" -fuzztime "$time" "$1" 2>&1 | tee "$out" && return 0
	grep -q '^    context deadline exceeded$' "$out" && ! grep -q 'Failing input' "$out"
}
while IFS=: read -r file target; do
	count=$((count + 1))
	dir=$(dirname "$file")
	echo "== $dir $target"
	run "$dir" "$target" </dev/null || failed+=("$dir $target")
done < <(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' "./${2:-}" | sed 's/:func /:/' | sort)
echo "$count targets, ${#failed[@]} failed"
for f in "${failed[@]}"; do echo "  $f"; done
[ "$count" -gt 0 ] && [ ${#failed[@]} -eq 0 ]
