# syntax=docker/dockerfile:1
# The image of all of Egret's containers: two static programs on Debian slim. Nothing else is put onto it: egretd speaks
# to the kernel over netlink and calls no program, `nft` included.
#
#   docker build -t egret .          or podman build, or buildah build
#
# BUILDER needs the Rust toolchain of rust-toolchain.toml, a C linker and the C library's static half.
ARG BUILDER=docker.io/library/rust:1.95.0-slim-trixie
ARG BASE=docker.io/library/debian:trixie-slim

FROM ${BUILDER} AS build
# How cargo builds: release, or dev.
ARG PROFILE=release
WORKDIR /src
COPY Cargo.toml Cargo.lock rust-toolchain.toml ./
COPY .cargo .cargo
COPY release release
COPY src src
COPY crates crates
COPY benches benches
COPY tests tests
# A release is stripped already: what is in the image is what `make build` makes, bit by bit.
RUN release/build.sh "$PROFILE" \
 && mkdir /out \
 && for program in egretd egret-cni; do \
      cp target/*-linux-*/"$([ "$PROFILE" = dev ] && echo debug || echo "$PROFILE")/$program" /out/; \
    done \
 && { [ "$PROFILE" != dev ] || strip /out/*; }

FROM ${BASE}
COPY --from=build /out/egretd /out/egret-cni /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/egretd"]
