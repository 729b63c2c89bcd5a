# What a person runs is what CI runs (.ci/run). Each target sets up what it needs: Rust aside, a fresh Debian or Ubuntu
# is enough. Tests and demo build network namespaces, for which they become root by sudo if they are not.

# For PIPESTATUS.
SHELL := /bin/bash
CARGO ?= cargo
ifneq ($(shell id -u),0)
# Cargo builds as the user; only what it has built runs as root.
AS_ROOT = --config 'target."cfg(target_os = \"linux\")".runner = ["sudo", "-E"]'
endif

# Where the image is going to be. Nobody can pull this one.
IMAGE ?= egret.invalid/egret:v$(shell sed -n 's/^version = "\(.*\)"$$/\1/p' Cargo.toml | head -1)
ifneq ($(shell id -u),0)
SUDO = sudo -E
endif

# Of `make e2e`: which tests, and of which program of tests/.
T ?=
S ?= e2e

# Of `make fuzz`: how long in seconds, the first seed, and a sequence to run instead.
SECONDS ?= 180
SEED ?= 1

.PHONY: help bpf build image release reproducible demo unit e2e snapshots test fuzz vm-test cluster-test lint bench setup apiserver clean-lab

help:
	@echo 'make build      static release binaries, in target/<host>/release'
	@echo 'make image      the image, without docker, in target/image/image.tar; IMAGE=registry.example/egret:v1 names it'
	@echo 'make release    programs, image, manifests, chart, SBOM, checksums, in target/release-<version>; IMAGE as above'
	@echo 'make demo       three nodes, two gateways and a server on this machine: who is seen as whom'
	@echo 'make unit       what needs no root: the code without a kernel, its structure, what the programs say'
	@echo 'make e2e T=…    scenarios whose names contain this, each in a lab; S=kubernetes, containerd, plugin, kernel: others'
	@echo 'make test       all tests'
	@echo 'make bpf        compile the fast path anew, crates/bpf/programs, with clang 14 of Debian 12'
	@echo 'make snapshots  write tests/snapshots, tests/rulesets and tests/convert anew, to be looked at with git diff'
	@echo 'make reproducible  the release, built twice: the same bits, and no path of this machine in them'
	@echo 'make cluster-test KUBECONFIG=… SERVER=… ADDRESSES=…   the acceptance suite, against any cluster: tests/cluster/README.md'
	@echo 'make fuzz       SECONDS=180 SEED=1: what happens to clusters, at random, and who is seen as whom meanwhile'
	@echo 'make vm-test    KERNEL=5.10: scenarios in a virtual machine with a Debian kernel: 5.10, 6.1, 6.12, newest; T=… which'
	@echo 'make lint       format, clippy, documentation, licences and bans, generated files'
	@echo 'make bench      measurements'
	@echo 'make clean-lab  remove what killed tests left behind'

build:
	@release/build.sh

image: setup
	@mkdir -p target/image
	$(SUDO) tests/image.sh target/image $(IMAGE) release

release: setup
	@release/release.sh $(IMAGE)

# Two builds of the release, compared bit by bit.
reproducible:
	@release/reproducible.sh

demo: setup
	$(CARGO) test --locked $(AS_ROOT) --test demo

unit:
	$(CARGO) test --locked --no-fail-fast --lib --test cli --test structure -- --skip needs_root
	$(CARGO) test --locked --doc --package egret-nft

# The API server is there for those that need it alone.
e2e: setup $(if $(filter kubernetes,$(S)),apiserver)
	$(CARGO) test --locked $(AS_ROOT) --test $(S) -- $(T)

# The bits of the results depend on the compiler: crates/bpf/programs/build.sh says which made those in the repository.
bpf:
	@tests/setup.sh clang=clang llvm-strip=llvm bpftool=bpftool /usr/include/bpf/bpf_helpers.h=libbpf-dev python3=python3
	@crates/bpf/programs/build.sh
	@tests/lab/programs/build.sh

snapshots: setup
	EGRET_WRITE_SNAPSHOTS=1 $(CARGO) test --locked --test cli
	EGRET_WRITE_SNAPSHOTS=1 $(CARGO) test --locked --lib ruleset
	EGRET_WRITE_SNAPSHOTS=1 $(CARGO) test --locked --lib convert
	EGRET_WRITE_SNAPSHOTS=1 $(CARGO) test --locked --lib ctl
	EGRET_WRITE_SNAPSHOTS=1 $(CARGO) test --locked $(AS_ROOT) --test e2e snapshots

test: setup apiserver
	@rm -f target/*/tmp/not-run target/tmp/not-run
	@mkdir -p target
	$(CARGO) test --locked $(AS_ROOT) --no-fail-fast 2>&1 | tee target/test.log; code=$${PIPESTATUS[0]}; \
	  tests/not-run.sh; tests/failures.sh target/test.log; exit $$code

# Against any cluster that nobody uses: tests/cluster/README.md.
cluster-test:
	@tests/cluster/run.sh

fuzz: setup
	@FUZZ_SECONDS='$(SECONDS)' FUZZ_SEED='$(SEED)' FUZZ_SHRINK='$(SHRINK)' FUZZ_SEQUENCE='$(SEQUENCE)' \
	  $(CARGO) test --locked $(AS_ROOT) --test fuzz

# Needs no root, no KVM, and some minutes: docs/kernels.md.
vm-test:
	@tests/setup.sh qemu-system-x86_64=qemu-system-x86 busybox=busybox-static cpio=cpio depmod=kmod xz=xz-utils wg=wireguard-tools
	@KERNEL='$(KERNEL)' T='$(T)' ACCEL='$(ACCEL)' LIMIT='$(LIMIT)' CARGO='$(CARGO)' tests/vm/run.sh

bench: setup apiserver
	$(CARGO) bench --locked $(AS_ROOT) --benches

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked --test demo --test fuzz -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps
	@tests/generated.sh
	@crates/bpf/programs/compare.sh
	@tests/dependencies.sh

setup:
	@tests/setup.sh

# kube-apiserver and etcd, once: three minutes where they have to be built.
apiserver:
	@tests/kubernetes/apiserver.sh >/dev/null

clean-lab:
	@tests/clean-lab.sh
