#!/bin/bash
# Runs every fuzz target of the module, or of the packages below DIR, for TIME each. All
# are run, whatever fails; what failed is listed in the end.
#   tools/fuzz.sh TIME [DIR]
# FUZZ_WRAP is put before each run: FUZZ_WRAP='nice -n 10' is friendly to others.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?how long each target runs, such as 20s}
failed=()
count=0
while IFS=: read -r file target; do
	count=$((count + 1))
	echo "== $(dirname "$file") $target"
	# shellcheck disable=SC2086 # the wrapper may have arguments
	if ! ${FUZZ_WRAP:-} go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$(dirname "$file")"; then
		failed+=("$(dirname "$file") $target")
	fi
done < <(grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' "./${2:-}" | sed 's/:func /:/' | sort)
echo "$count targets, ${#failed[@]} failed"
for f in "${failed[@]}"; do echo "  $f"; done
[ "$count" -gt 0 ] && [ ${#failed[@]} -eq 0 ]
