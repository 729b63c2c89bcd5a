#!/bin/bash
# Removes what tests that were killed left behind: namespaces and directories egt-PID-N… of a PID that is no more.
set -eu
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
shopt -s nullglob
for path in /run/netns/egt-* "${TMPDIR:-/tmp}"/egt-*; do
  name=${path##*/}
  [[ $name =~ ^egt-([0-9]+)-[0-9]+(-|$) ]] && [ ! -e "/proc/${BASH_REMATCH[1]}" ] || continue
  echo "clean-lab: $path"
  if [[ $path == /run/netns/* ]]; then
    "${sudo[@]}" ip netns pids "$name" | xargs -r "${sudo[@]}" kill -9
    "${sudo[@]}" ip netns del "$name"
  else
    "${sudo[@]}" rm -rf "$path"
  fi
done
