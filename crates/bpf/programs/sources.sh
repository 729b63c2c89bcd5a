#!/bin/sh
# Prints the hashes of what the compiled files are made of.
set -eu
cd "$(dirname "$0")"
sha256sum fast_path.bpf.c fast_path.h kernel.h lease.h packet.h rewrite.h skeleton.py tunnel.h
