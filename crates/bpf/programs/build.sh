#!/bin/sh
# Compiles the programs of the fast path to a light skeleton: a program that loads the others, and its data. The argument is
# the directory of the results; without one they replace the files beside this script. The bits depend on the compiler: the
# files in the repository are made by clang 14, bpftool 7.1 and libbpf 1.1 of Debian 12.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(cd "${1:-$here}" && pwd)
cd "$here"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
# No path of this machine, so that the same compiler makes the same bits everywhere. Leases are sealed by words and written by
# fields.
clang -O2 -g -Wall -Werror -target bpf -mcpu=v3 -fno-strict-aliasing -fdebug-compilation-dir=. \
  -I"/usr/include/$(uname -m)-linux-gnu" -c fast_path.bpf.c -o "$work/fast_path.o"
llvm-strip -g "$work/fast_path.o"
bpftool gen skeleton -L "$work/fast_path.o" >"$work/fast_path.lskel.h"
python3 skeleton.py "$work/fast_path.lskel.h" "$out"
./sources.sh >"$out/fast_path.sources"
