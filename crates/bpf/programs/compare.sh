#!/bin/sh
# Fails if the compiled programs were made of other sources than those beside them, and, where the compiler is the one that
# made them (clang 14 of Debian 12), if it makes other bits of them. Another compiler's bits differ, and say nothing.
set -eu
cd "$(dirname "$0")"
if ! ./sources.sh | diff -u fast_path.sources -; then
  echo "fast path: the compiled programs are older than their sources; run: make bpf" >&2
  exit 1
fi
compiler="$(clang --version 2>/dev/null | head -1) $(bpftool version 2>/dev/null | head -1)"
if [ "$compiler" != "Debian clang version 14.0.6 bpftool v7.1.0" ]; then
  echo "fast path: not compiled again, as this is not the compiler of its files: $compiler"
  exit 0
fi
new=$(mktemp -d)
trap 'rm -r "$new"' EXIT
./build.sh "$new"
for file in fast_path.data fast_path.code fast_path.order; do
  cmp "$file" "$new/$file" || { echo "fast path: its compiled programs differ from what is compiled now; run: make bpf" >&2; exit 1; }
done
echo "fast path: the compiled programs are up to date"
