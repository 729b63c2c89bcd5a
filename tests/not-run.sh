#!/bin/bash
# Names the tests that could not run with the API server that is here.
cd "$(dirname "$0")/.." || exit
tests=$(cat target/*/tmp/not-run target/tmp/not-run 2>/dev/null | sort -u)
[ -n "$tests" ] || exit 0
echo 'not run, for the API server is too old (tests/kubernetes/apiserver.sh says which one is taken):'
sed 's/^/  /' <<<"$tests"
