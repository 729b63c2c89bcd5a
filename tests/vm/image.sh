#!/bin/bash
# An initramfs of this machine's own programs with the modules of a kernel: `image.sh KERNEL-ROOT OUTPUT`. It has what
# tests of tests/e2e call; the tests and Egret's programs come in a second archive (run.sh).
set -eu
root=$1 output=$2
PATH=$PATH:/usr/sbin:/sbin
image=$(mktemp -d)
trap 'rm -rf "$image"' EXIT
mkdir -p "$image"/{bin,dev,etc,lib,mnt,proc,root,run,sbin,sys,tmp,usr/bin,usr/sbin,var/{lib,log},root}
ln -s /run "$image/var/run"

# A program with its libraries, at its own path.
add() {
  local file=$1
  # A link, of the alternatives for instance: also what it leads to.
  cp --parents -P "$file" "$image"
  if [ -L "$file" ]; then
    local next
    next=$(readlink "$file")
    case $next in /*) ;; *) next=$(dirname "$file")/$next ;; esac
    add "$next"
    return
  fi
  { ldd "$file" 2>/dev/null || true; } | grep -o '/[^ ]*' | while read -r library; do
    [ -e "$image$library" ] || cp --parents -L "$library" "$image"
  done
}
for program in ip tc bridge ss nft conntrack iptables iptables-save iptables-restore ip6tables ip6tables-save \
  ip6tables-restore iptables-legacy ip6tables-legacy iptables-nft iptables-legacy-restore ip6tables-legacy-restore \
  iptables-nft-restore ip6tables-nft-restore wg socat arping tcpdump bpftool ethtool nstat sysctl mount umount sleep \
  sh bash cat true false kmod modprobe unshare nsenter; do
  add "$(type -P "$program")"
done
cp "$(command -v busybox)" "$image/bin/busybox"
# /bin and /sbin are links on a merged system, and so are the paths that were added.
for directory in bin sbin; do
  for program in "$image/usr/$directory"/*; do
    [ -e "$image/$directory/$(basename "$program")" ] || ln -s "/usr/$directory/$(basename "$program")" "$image/$directory/"
  done
done
for program in /usr/lib/cni/*; do add "$program"; done
cp -r --parents /usr/lib/*/xtables "$image"
for file in /etc/protocols /etc/services /etc/passwd /etc/group /etc/iproute2 /usr/share/iproute2; do
  [ ! -e "$file" ] || cp -r --parents "$file" "$image"
done
mkdir -p "$image/lib64"
for loader in /lib64/ld-linux-x86-64.so.2; do
  [ -e "$image$loader" ] || cp --parents -L "$loader" "$image"
done

# The modules of the network. What they need beside it is in lib and crypto.
version=$(basename "$root"/lib/modules/*)
from=$root/lib/modules/$version to=$image/lib/modules/$version
mkdir -p "$to"
cp "$from"/modules.builtin* "$from"/modules.order "$to" 2>/dev/null || true
(cd "$from" && find kernel/net kernel/lib kernel/crypto kernel/arch/x86/crypto kernel/arch/x86/lib \
  kernel/drivers/net/{vxlan,veth,dummy,vrf,wireguard,ifb,tun,macvlan,ipvlan,bonding} \
  kernel/drivers/net/{veth,dummy,vrf,ifb,tun,macvlan,vxlan}.ko* kernel/fs/fuse -name '*.ko*' \
  -not -path '*/bluetooth/*' -not -path '*/mac80211/*' -not -path '*/wireless/*' -not -path '*/batman-adv/*' \
  -exec cp --parents {} "$to" \; 2>/dev/null || true)
find "$to" -name '*.ko.xz' -exec xz -d {} +
find "$to" -name '*.ko.zst' -exec zstd -q -d --rm {} + 2>/dev/null || true
depmod -b "$image" "$version"
cp "$(dirname "$0")/init" "$image/init"
(cd "$image" && find . -print0 | cpio --quiet -0 -o -H newc -R 0:0) >"$output"
