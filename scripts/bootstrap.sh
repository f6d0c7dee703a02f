#!/usr/bin/env bash
# Installs what a fresh Debian (bookworm, trixie) with Rust lacks for jetdr. Idempotent: when all is
# there it only looks, and touches no network. After it, builds and tests work offline.
#
#   scripts/bootstrap.sh [demo|test|bench|vib|ci]      (default: test)
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-test}
# Released together with the configuration in .config/nextest.toml; newer ones may want a newer Rust.
nextest_version=0.9.143
bare_target=x86_64-unknown-none
# Of PyPI: a linker that knows old libcs, cargo's way to it, and a reader of visor tars for tests.
python_tools=(ziglang==0.17.1 cargo-zigbuild==0.24.0 dissect.hypervisor==3.21)

# command:package, by what needs it. A command that exists is enough, wherever it came from.
base=(cc:build-essential git:git)
demo=("${base[@]}" mkfs.ext4:e2fsprogs e2fsck:e2fsprogs qemu-io:qemu-utils nbdcopy:libnbd-bin fio:fio)
vib=("${base[@]}" python3:python3-venv objdump:binutils)
test=("${demo[@]}" qemu-img:qemu-utils nbdinfo:libnbd-bin node:nodejs npm:npm ps:procps xz:xz-utils
    debugfs:e2fsprogs qemu-system-x86_64:qemu-system-x86
    "${vib[@]}" xmllint:libxml2-utils openssl:openssl shellcheck:shellcheck dash:dash busybox:busybox)
bench=("${demo[@]}" nbdkit:nbdkit iperf3:iperf3 taskset:util-linux)
ci=("${test[@]}")

case $profile in
    demo) needed=("${demo[@]}") ;;
    test) needed=("${test[@]}") ;;
    bench) needed=("${bench[@]}") ;;
    vib) needed=("${vib[@]}") ;;
    ci) needed=("${ci[@]}") ;;
    *) echo "usage: scripts/bootstrap.sh [demo|test|bench|vib|ci]" >&2; exit 2 ;;
esac

say() { printf 'bootstrap: %s\n' "$*" >&2; }
die() { printf 'bootstrap: %s\n' "$*" >&2; exit 1; }

# mkfs.ext4 and e2fsck live in sbin, which is not on everybody's path.
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

install_packages() {
    local entry name missing=()
    for entry in "${needed[@]}"; do
        command -v "${entry%%:*}" >/dev/null 2>&1 || missing+=("${entry##*:}")
    done
    # bindgen loads libclang (libclang-cpp, which is there more often, is another library); only the
    # comparison of the committed bindings needs it.
    if [[ $profile == ci ]] && ! compgen -G '/usr/lib/llvm-*/lib/libclang.so*' >/dev/null \
        && ! compgen -G '/usr/lib/llvm-*/lib/libclang-[0-9]*.so*' >/dev/null; then
        missing+=(libclang-dev)
    fi
    # Debian's python3 comes without what makes a venv.
    if [[ " ${needed[*]} " == *" python3:"* ]] && ! python3 -c 'import ensurepip' 2>/dev/null; then
        missing+=(python3-venv)
    fi
    [[ ${#missing[@]} -eq 0 ]] && return 0
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    local sudo=()
    if [[ $(id -u) -ne 0 ]]; then
        if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
            say "these Debian packages are missing: ${missing[*]}"
            say "as root: apt-get update && apt-get install --no-install-recommends ${missing[*]}"
            die "and then run this again"
        fi
        sudo=(sudo -n)
    fi
    command -v apt-get >/dev/null || die "not a Debian: install ${missing[*]} (or what they are called here)"
    say "installing ${missing[*]}"
    "${sudo[@]}" apt-get update -q
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends "${missing[@]}"
    for entry in "${needed[@]}"; do
        name=${entry%%:*}
        command -v "$name" >/dev/null || die "$name is still missing after installing ${entry##*:}"
    done
}

toolchain() {
    command -v cargo >/dev/null || die "Rust is missing: see https://rustup.rs"
    if ! command -v rustup >/dev/null; then
        say "no rustup: using $(rustc --version); rust-toolchain.toml names the version that is tested"
        return 0
    fi
    local channel
    channel=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' rust-toolchain.toml)
    # Asked without a leading `rustc`, which might install by itself, and without its components.
    if ! rustup toolchain list | grep -q "^$channel-"; then
        say "installing Rust $channel"
        rustup toolchain install "$channel" --profile minimal --component rustfmt,clippy
    fi
    local components
    components=$(rustup component list --installed --toolchain "$channel")
    if ! grep -q ^clippy <<<"$components" || ! grep -q ^rustfmt <<<"$components"; then
        rustup component add --toolchain "$channel" rustfmt clippy
    fi
}

# The core must build where there is no operating system at all.
bare_metal_target() {
    if [[ -d $(rustc --print sysroot)/lib/rustlib/$bare_target ]]; then
        return 0
    fi
    command -v rustup >/dev/null || die "no rustup: cannot add the target $bare_target"
    say "adding the target $bare_target"
    rustup target add "$bare_target"
}

cargo_tool() { # command, crate, version
    if command -v "$1" >/dev/null || [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/$1 ]]; then
        return 0
    fi
    say "building $2 $3 (some minutes, once)"
    # It starts tests and waits for them: unoptimised it does so as well, and builds in a third.
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --locked --debug --version "$3" "$2"
}

crates() {
    if cargo fetch --locked --offline >/dev/null 2>&1; then
        return 0
    fi
    say "fetching the crates of Cargo.lock"
    cargo fetch --locked
}

azurite() {
    local folder=tests/azurite
    # npm writes this copy of the lock last: it is newer exactly when all of it is installed.
    if [[ $folder/node_modules/.package-lock.json -nt $folder/package-lock.json ]]; then
        return 0
    fi
    say "installing Azurite (the Azure Blob emulator)"
    npm ci --prefix "$folder" --no-audit --no-fund --loglevel=error
    touch "$folder/node_modules/.package-lock.json"
}

# Apart from the system's Python, in a folder that is no part of the repository.
python_venv() {
    local folder=target/tools stamp=target/tools/installed
    if [[ -f $stamp && $(<"$stamp") == "${python_tools[*]}" ]]; then
        return 0
    fi
    say "installing ${python_tools[*]} into $folder"
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "${python_tools[@]}"
    echo "${python_tools[*]}" >"$stamp"
}

install_packages
toolchain
crates
if [[ $profile == vib || $profile == test || $profile == ci ]]; then
    python_venv
fi
if [[ $profile == test || $profile == ci ]]; then
    azurite
    scripts/guest.sh
    cargo_tool cargo-nextest cargo-nextest "$nextest_version"
fi
if [[ $profile == ci ]]; then
    bare_metal_target
fi
