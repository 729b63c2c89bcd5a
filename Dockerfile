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
COPY src src
COPY benches benches
COPY tests tests
# Stripped here, since not every profile does it.
RUN cargo build --locked --profile "$PROFILE" --bins \
 && mkdir /out \
 && for program in egretd egret-cni; do \
      strip -o "/out/$program" target/*-linux-*/"$([ "$PROFILE" = dev ] && echo debug || echo "$PROFILE")/$program"; \
    done

FROM ${BASE}
COPY --from=build /out/egretd /out/egret-cni /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/egretd"]
