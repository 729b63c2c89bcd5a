#!/bin/bash
# Fails if a generated file is not what its generator writes today.
set -eu
cd "$(dirname "$0")/.."
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
install/generate.sh "$new"
failed=0
while read -r file; do
  diff -u "install/$file" "$new/$file" || failed=1
done < <(cd "$new" && find . -type f | sed 's|^\./||')
if [ $failed = 1 ]; then
  echo "generated: files in install/ are not what they are made of says; run: install/generate.sh" >&2
  exit 1
fi
echo "generated: install/ is up to date"
