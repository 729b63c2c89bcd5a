#!/bin/bash
# Builds the static programs without a trace of where they were built: the same sources give the same bits in any
# directory, for any user. They lie where cargo puts them.
#   release/build.sh [PROFILE]      release, if nothing is said
set -eu
cd "$(dirname "$0")/.."
profile=${1:-release}
cargo=${CARGO:-cargo}
# What is not optimized is for tests, which have most of it compiled already, by other flags.
[ "$profile" != dev ] || exec "$cargo" build --locked --bins --profile dev
home=${CARGO_HOME:-$HOME/.cargo}
sysroot=$(rustc --print sysroot)
remap=()
# The last one that fits is taken.
for pair in "$home=/cargo" "$sysroot=/rust" "$PWD=/egret"; do
  remap+=("\"--remap-path-prefix=$pair\"")
done
flags=$(IFS=,; echo "${remap[*]}")
# What is C (ring) names its files in assertions.
export CFLAGS="${CFLAGS:-} -ffile-prefix-map=$home=/cargo -ffile-prefix-map=$PWD=/egret"
# To the flags of .cargo/config.toml, not in their place, as RUSTFLAGS would be.
exec "$cargo" build --locked --bins --profile "$profile" --config "target.'cfg(target_os = \"linux\")'.rustflags = [$flags]"
