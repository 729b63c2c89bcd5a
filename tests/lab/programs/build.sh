#!/bin/sh
# Compiles the programs that tests put at pods' veths, in other CNIs' place. Tests load the file in the repository, so that
# they need no compiler; `make bpf` runs this.
set -eu
cd "$(dirname "$0")"
clang -O2 -Wall -Werror -target bpf -fdebug-compilation-dir=. -I"/usr/include/$(uname -m)-linux-gnu" \
  -c redirect.bpf.c -o redirect.o
