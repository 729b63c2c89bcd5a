#!/bin/bash
# Licences, bans and sources of all dependencies, and known vulnerabilities where their list can be fetched.
set -eu
cd "$(dirname "$0")/.."
cargo deny --version >/dev/null 2>&1 || { echo "dependencies: installing cargo-deny"; cargo install cargo-deny --locked; }
cargo deny --log-level error check bans licenses sources
if timeout 60 cargo deny --log-level error fetch db 2>/dev/null; then
  cargo deny --log-level error check --disable-fetch advisories
else
  echo "dependencies: ATTENTION: https://github.com/rustsec/advisory-db cannot be fetched from here;" \
    "known vulnerabilities were NOT looked for" >&2
fi
