#!/usr/bin/env bash
# The Rust side of include/iofilter.h: `write` makes include/bindings.rs anew, `check` compares it.
# It is committed, so that a build needs no libclang. The generator is an example of the conformance
# crate: Cargo.lock fixes its version.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"

generate() { cargo run --locked --quiet -p conformance --example bindings -- "$@"; }

case ${1:-} in
    write) generate ;;
    check)
        generate --check
        echo "include/bindings.rs matches include/iofilter.h"
        ;;
    *)
        echo "usage: scripts/bindings.sh write|check" >&2
        exit 2
        ;;
esac
