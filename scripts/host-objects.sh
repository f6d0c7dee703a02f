#!/usr/bin/env bash
# Builds what a host gets, the filter library and the daemon, without symbols and linked for an old libc,
# and checks both: at most GLIBC 2.17, no libraries but libc's own.
#   scripts/host-objects.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: scripts/host-objects.sh OUT}
glibc=2.17
target=x86_64-unknown-linux-gnu
built=${CARGO_TARGET_DIR:-target}/$target/host
# cargo-zigbuild and the linker that it drives: scripts/bootstrap.sh vib.
PATH="$PWD/target/tools/bin:$PATH"

die() { printf 'host-objects: %s\n' "$*" >&2; exit 1; }

# What is built names its sources; where they lie on this machine is nobody's business, and would make
# other bytes of it on each.
export RUSTFLAGS="--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo --remap-path-prefix=$PWD=/jetdr"

command -v cargo-zigbuild >/dev/null || die "cargo-zigbuild is missing: scripts/bootstrap.sh vib"
cargo zigbuild --locked --profile host -p vaio-shim -p filter-daemon --target "$target.$glibc"
mkdir -p "$out"
install -m 0755 "$built/libvaio_shim.so" "$out/libvmiof-disk-jetdr.so"
install -m 0755 "$built/iofilterd-jetdr" "$out/iofilterd-jetdr"

check() { # file
    local symbols needed newest
    symbols=$(objdump -T "$1" | grep -o 'GLIBC_[0-9.]*' | sort -uV)
    newest=$(printf '%s\n' "$symbols" "GLIBC_$glibc" | sort -uV | tail -n 1)
    [[ $newest == "GLIBC_$glibc" ]] || die "$1 needs $newest, over GLIBC_$glibc"
    needed=$(objdump -p "$1" | awk '$1 == "NEEDED" { print $2 }')
    while read -r library; do
        case $library in
            libc.so.6 | libm.so.6 | libpthread.so.0 | libdl.so.2 | librt.so.1 | ld-linux-x86-64.so.2) ;;
            *) die "$1 needs $library, which is not libc's own" ;;
        esac
    done <<<"$needed"
    printf '%9d bytes  %s  (at most %s; %s)\n' "$(stat -c %s "$1")" "$1" \
        "$(tail -n 1 <<<"$symbols")" "$(tr '\n' ' ' <<<"$needed")"
}
check "$out/libvmiof-disk-jetdr.so"
check "$out/iofilterd-jetdr"
