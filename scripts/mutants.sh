#!/usr/bin/env bash
# Takes one guard after the other out of the product, and simulates until some seed fails:
#   scripts/mutants.sh [SEEDS] [GUARD...]      (default: 2000 seeds, every guard)
# Prints a table: the guard, what it does, the first seed that fails, what is violated. A guard that stands behind
# others (filter-core/src/mutant.rs says which) is taken out together with them if alone it is not missed.
# A guard that can be taken out unnoticed makes it exit non-zero.
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=${1:-2000}
shift || true
wanted=" $* "
if [[ -z ${SIMULATOR:-} ]]; then
    cargo build --locked --release -p simulator
    SIMULATOR=${CARGO_TARGET_DIR:-target}/release/simulator
fi
# Prints "seed<TAB>violation"; fails if no seed fails.
search() { # guards
    local found
    ! found=$("$SIMULATOR" --without "$1" --seeds "$seeds" --brief) && [[ -n $found ]] && echo "$found"
}
row() { # guard, what, found
    local seed violation
    IFS=$'\t' read -r seed violation <<<"$3"
    printf '| %s | %s | %s | %s |\n' "$1" "$2" "$seed" "$(cut -c1-120 <<<"${violation//|//}")"
}
unnoticed=0
printf '| guard | what it does | first seed | what is violated |\n|---|---|---|---|\n'
while IFS=$'\t' read -r guard what with why; do
    [[ $wanted == "  " || $wanted == *" $guard "* ]] || continue
    if found=$(search "$guard"); then
        row "$guard" "$what" "$found"
    elif [[ -n $with ]] && found=$(search "$guard,$with"); then
        row "$guard, with $with" "$what (Alone it is not missed: $why.)" "$found"
    else
        row "$guard" "$what" $'none\t'
        unnoticed=$((unnoticed + 1))
    fi
done < <("$SIMULATOR" --guards)
if ((unnoticed > 0)); then
    echo "$unnoticed guards can be taken out unnoticed" >&2
    exit 1
fi
