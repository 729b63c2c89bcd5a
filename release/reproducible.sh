#!/bin/bash
# Builds twice from the sources, in two directories of different names, and fails if the programs differ, or name a
# directory of this machine.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for copy in one a-directory-of-another-name; do
  mkdir -p "$work/$copy"
  git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/$copy"
  "$work/$copy/release/build.sh" "$@"
done
failed=0
for program in egretd egret-cni kubectl-egret; do
  mapfile -t built < <(find "$work"/*/target/*-linux-*/ -maxdepth 2 -type f -name "$program" -perm -u+x)
  sha256sum "${built[@]}" | sed "s|$work/||"
  if [ "${#built[@]}" != 2 ] || ! cmp "${built[@]}"; then
    echo "reproducible: $program differs between two builds" >&2
    failed=1
  fi
  for directory in "$work" "${CARGO_HOME:-$HOME/.cargo}" "$(rustc --print sysroot)"; do
    if grep -aqF "$directory" "${built[0]}"; then
      echo "reproducible: $program names $directory, where it was built" >&2
      failed=1
    fi
  done
done
[ $failed = 0 ] && echo 'reproducible: the same bits twice, and no path of this machine in them'
exit $failed
