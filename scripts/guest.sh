#!/usr/bin/env bash
# What a booted guest needs, below target/guest: a Debian kernel, and an initramfs of busybox and the
# modules for a virtio disk. Taken out of packages that are never installed on this machine. The
# packages come through apt, which checks them against the signed index; a list of checksums tells
# later whether all is still as it was made, and then nothing touches the network.
#
#   scripts/guest.sh
set -euo pipefail
cd "$(dirname "$0")/.."

out=${CARGO_TARGET_DIR:-target}/guest
say() { printf 'guest: %s\n' "$*" >&2; }
die() { printf 'guest: %s\n' "$*" >&2; exit 1; }

# What is not there is part of the kernel.
modules=(
    drivers/virtio/virtio_ring drivers/virtio/virtio drivers/virtio/virtio_pci_legacy_dev
    drivers/virtio/virtio_pci_modern_dev drivers/virtio/virtio_pci drivers/block/virtio_blk
    lib/crc16 crypto/crc32c_generic arch/x86/lib/crc32c-x86_64 lib/libcrc32c fs/mbcache
    fs/jbd2/jbd2 fs/ext4/ext4
)

if (cd "$out" 2>/dev/null && sha256sum --quiet --check SHA256SUMS 2>/dev/null); then
    exit 0
fi
command -v apt-get >/dev/null || die "not a Debian: put a kernel and an initramfs into $out yourself"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# apt's own user reads it, if root runs this.
chmod 755 "$work"

# The newest kernel that this machine's index knows: an old one leaves the archive.
kernel_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null \
        | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

fetch() {
    local package
    package=$(kernel_package)
    [[ -n $package ]] || return 1
    say "fetching $package and busybox-static"
    (cd "$work" && apt-get download -q "$package" busybox-static)
}

if ! fetch; then
    sudo=()
    [[ $(id -u) -eq 0 ]] || sudo=(sudo -n)
    "${sudo[@]}" apt-get update -q
    fetch || die "no kernel package could be fetched: is linux-image-cloud-amd64 in an apt source?"
fi

for package in "$work"/*.deb; do
    dpkg-deb -x "$package" "$work/tree"
done
kernel=$(echo "$work"/tree/boot/vmlinuz-*)
busybox=$(find "$work/tree" -type f -path '*/bin/busybox')
[[ -f $kernel && -f $busybox ]] || die "the packages hold no kernel or no busybox"
from=$(find "$work/tree" -type d -path '*/modules/*/kernel' | head -n 1)

root=$work/root
mkdir -p "$root"/{bin,modules,proc,sys,dev,mnt}
install -m 755 "$busybox" "$root/bin/busybox"
for module in "${modules[@]}"; do
    name=${module##*/}
    if [[ -f $from/$module.ko ]]; then
        cp "$from/$module.ko" "$root/modules/$name.ko"
    elif [[ -f $from/$module.ko.xz ]]; then
        xz -dc "$from/$module.ko.xz" >"$root/modules/$name.ko"
    else
        continue
    fi
    echo "$name" >>"$root/modules/order"
done

rm -rf "$out"
mkdir -p "$out"
cp "$kernel" "$out/vmlinuz"
(cd "$root" && find . | LC_ALL=C sort | ./bin/busybox cpio -o -H newc 2>/dev/null) >"$out/base.cpio"
(cd "$out" && sha256sum vmlinuz base.cpio >"$work/sums" && mv "$work/sums" SHA256SUMS)
say "a kernel and an initramfs are in $out"
