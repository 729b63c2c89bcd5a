#!/bin/bash
# `make vm-test`: tests of tests/e2e in a virtual machine with a Debian kernel. Without KVM, which needs ACCEL=kvm, the
# machine's clock goes by the instructions that it executes (-icount), so that fractions of a second are right under
# emulation, however busy this machine is.
set -eu
cd "$(dirname "$0")/../.."
kernel=${KERNEL:-5.10}
# What is run, a program call a line: names of tests, as `make e2e T=…` takes them, with flags of the test program.
tests=${T:-"--ignored refusals::
datapath::pods_on_every_kind
tunnel_egress::pods_on_every_node
tunnel_egress::whatever_is_taken
failover::connections_survive_a_lost_link
--ignored other_kernels::uplinks
uninstall::uninstallation_restores"}
accel=${ACCEL:-tcg}
limit=${LIMIT:-7200}
PATH=$PATH:/usr/sbin:/sbin

root=$(tests/vm/kernel.sh "$kernel")
# Newer packages have the kernel beside its modules.
linux=$(find "$root"/boot/vmlinuz-* "$root"/lib/modules/*/vmlinuz 2>/dev/null | head -1)
work=target/vm/$kernel
mkdir -p "$work"
image=$work/image.cpio
if [ ! -e "$image" ] || [ tests/vm/image.sh -nt "$image" ] || [ tests/vm/init -nt "$image" ]; then
  tests/vm/image.sh "$root" "$image.new"
  mv "$image.new" "$image"
fi

# Everything has the path that it was built with: tests know that of the repository and of the programs.
# BUILT names a test program that is there already.
built=${BUILT:-$(${CARGO:-cargo} test --locked --no-run --test e2e 2>&1 | tee /dev/stderr | sed -n 's/.*(\(target[^)]*\/e2e-[0-9a-f]*\))/\1/p')}
programs=$work/programs
directory=$PWD/$(dirname "$built")
rm -rf "$programs"
mkdir -p "$programs/vm" "$programs$directory"
strip -o "$programs$directory/e2e" "$built"
for program in egretd egret-cni kubectl-egret; do
  strip -o "$programs$directory/../$program" "$directory/../$program"
done
cp -r install "$programs$PWD"
{
  echo "$directory/../egretd check"
  echo "$tests" | sed "s|^|$directory/e2e --nocapture |"
} >"$programs/vm/commands"
env | sed -n "s/^\(EGRET_TUNNEL_EGRESS\)=\(.*\)/export \1='\2'/p" >"$programs/vm/environment"
(cd "$programs" && find . -print0 | cpio --quiet -0 -o -H newc -R 0:0) >"$work/programs.cpio"
cat "$image" "$work/programs.cpio" >"$work/initrd"
rm -rf "$programs"

case $accel in
  kvm) machine=(-accel kvm -cpu host) ;;
  *) machine=(-accel tcg,thread=single -icount shift=0,sleep=off -cpu max) ;;
esac
log=$work/console.log
timeout "$limit" qemu-system-x86_64 "${machine[@]}" -smp 1 -m 2560 -nodefaults -nographic -no-reboot -serial stdio \
  -kernel "$linux" -initrd "$work/initrd" \
  -append 'console=ttyS0 panic=-1 quiet loglevel=3 mitigations=off random.trust_cpu=on net.ifnames=0' \
  </dev/null | tee "$log"
grep -q '^vm: ended with 0' "$log" || {
  echo "vm-test: Linux $kernel: failed, see above or $log" >&2
  exit 1
}
echo "vm-test: Linux $(grep -aoE -m 1 '[0-9]+\.[0-9]+\.[0-9]+[^ ]*-amd64' "$log" | head -1): passed"
