#!/usr/bin/env bash
# Runs every fuzz target (a test with a `bolero::check!`) for a number of seconds on random input:
#   scripts/fuzz.sh [SECONDS]      (default: 60)
# A failure prints its seed: BOLERO_RANDOM_SEED=<seed> and the test's name run it again.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
# Found by what they do, not by a naming rule that somebody would forget.
mapfile -t targets < <(git ls-files --cached --others --exclude-standard '*.rs' | xargs awk '
    match($0, /^ *fn [a-z0-9_]+/) { name = substr($0, RSTART, RLENGTH); sub(/^ *fn /, "", name) }
    /bolero::check!\(/ { print name }
' | sort -u)
[[ ${#targets[@]} -gt 0 ]] || { echo "no fuzz target was found" >&2; exit 1; }
printf 'fuzzing %d targets for %d s each: %s\n' "${#targets[@]}" "$seconds" "${targets[*]}"
pattern=$(IFS='|'; echo "${targets[*]}")
BOLERO_RANDOM_TEST_TIME_MS=$((seconds * 1000)) cargo nextest run --locked --release --workspace \
    --profile long -E "test(/(^|::)($pattern)\$/)"
