#!/usr/bin/env bash
# cargo-deny over the whole tree. The list of advisories lives on the network: where that cannot be
# reached, the rest is checked and it is said.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"

cargo deny --version >/dev/null 2>&1 || {
    echo "cargo-deny is missing: cargo install --locked cargo-deny" >&2
    exit 1
}
cargo deny --locked check --hide-inclusion-graph licenses bans sources
if cargo deny --locked fetch db >/dev/null 2>&1; then
    cargo deny --locked check --disable-fetch --hide-inclusion-graph advisories
else
    echo "advisories NOT checked: the advisory database cannot be fetched from here"
fi
