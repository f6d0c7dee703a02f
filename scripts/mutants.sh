#!/usr/bin/env bash
# Takes one guard after the other out of the product, and simulates until some seed fails:
#   scripts/mutants.sh [SEEDS]      (default: 2000)
# Prints a table: the guard, the first seed that fails, what is violated. A guard that can be taken out
# unnoticed makes it exit non-zero.
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=${1:-2000}
cargo build --locked --release -p simulator --features mutants
simulator=${CARGO_TARGET_DIR:-target}/release/simulator
unnoticed=0
printf '| guard | what it does | first seed | what is violated |\n|---|---|---|---|\n'
while IFS=$'\t' read -r guard what; do
    if found=$("$simulator" --without "$guard" --seeds "$seeds" --brief); then
        found=$'none\t'
        unnoticed=$((unnoticed + 1))
    fi
    IFS=$'\t' read -r seed violation <<<"$found"
    printf '| %s | %s | %s | %s |\n' "$guard" "$what" "$seed" "${violation:0:150}"
done < <("$simulator" --guards)
if ((unnoticed > 0)); then
    echo "$unnoticed guards can be taken out unnoticed" >&2
    exit 1
fi
