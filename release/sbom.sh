#!/bin/bash
# Writes what the programs are made of, CycloneDX: release/sbom.sh FILE. The tool is installed outside of the project.
set -eu
file=$(realpath -m "$1")
cd "$(dirname "$0")/.."
version=0.5.9
tools=${XDG_CACHE_HOME:-$HOME/.cache}/egret/tools
cargo=${CARGO:-cargo}
[ -x "$tools/bin/cargo-cyclonedx" ] && "$tools/bin/cargo-cyclonedx" cyclonedx --version | grep -qF "$version" ||
  (cd / && "$cargo" install --locked --root "$tools" --version "$version" cargo-cyclonedx)
machine=$(rustc -vV | sed -n 's/^host: //p')
# So that the same sources have the same list.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}

# Of a copy without tests and benches: the tool asks `cargo metadata`, which gives the programs' dependencies the features
# that the tests want of them, and with these further crates, which are in no program.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r src crates Cargo.lock rust-toolchain.toml "$work"
for manifest in Cargo.toml crates/*/Cargo.toml; do
  awk '/^\[/ { out = /^\[dev-dependencies|^\[\[(test|bench)\]\]/ } !out { sub(/, "tests\/lab"/, ""); print }' \
    "$manifest" >"$work/$manifest"
done
(cd "$work" && "$tools/bin/cargo-cyclonedx" cyclonedx --quiet --format json --spec-version 1.5 --target "$machine" \
  --no-build-deps --override-filename sbom)
"$cargo" tree --locked --package egret --edges normal --target "$machine" --prefix none --format '{p}' |
  awk 'NR > 1 { print $1, substr($2, 2) }' | LC_ALL=C sort -u >"$work/tree"

# Optional crates that only a feature of theirs is asked for (`crate?/feature`) are in no program either, and cargo tree
# leaves them out.
sed "s|file://$work|file:///egret|g" "$work/sbom.json" |
  jq --rawfile tree "$work/tree" '
    ($tree | split("\n")) as $tree
    | def out: "\(.name) \(.version)" as $crate | $tree | index($crate) == null;
    [.components[] | select(out) | ."bom-ref"] as $out
    | .components |= map(select(out | not))
    | .dependencies |= map(select(.ref | IN($out[]) | not) | if .dependsOn then .dependsOn -= $out else . end)' >"$file"
jq -r '.components[] | .name + " " + .version' "$file" | LC_ALL=C sort -u | diff "$work/tree" - ||
  { echo "sbom: $file does not list what cargo tree does (<)" >&2; exit 1; }
echo "sbom: $(wc -l <"$work/tree") crates"
