# What a person runs is what CI runs (.ci/run). Each target sets up what it needs: Rust aside, a fresh Debian or Ubuntu
# is enough. Tests and demo build network namespaces, for which they become root by sudo if they are not.

CARGO ?= cargo
ifneq ($(shell id -u),0)
# Cargo builds as the user; only what it has built runs as root.
AS_ROOT = --config 'target."cfg(target_os = \"linux\")".runner = ["sudo", "-E"]'
endif

.PHONY: help build demo test lint bench setup apiserver clean-lab

help:
	@echo 'make build      static release binaries, in target/<host>/release'
	@echo 'make demo       three nodes, two gateways and a server on this machine: who is seen as whom'
	@echo 'make test       all tests'
	@echo 'make lint       format, clippy, licences and bans, generated files'
	@echo 'make bench      measurements'
	@echo 'make clean-lab  remove what killed tests left behind'

build:
	$(CARGO) build --release --locked --bins

demo: setup
	$(CARGO) test --locked $(AS_ROOT) --test demo

test: setup apiserver
	@rm -f target/*/tmp/not-run target/tmp/not-run
	$(CARGO) test --locked $(AS_ROOT) --no-fail-fast; code=$$?; tests/not-run.sh; exit $$code

bench: setup apiserver
	$(CARGO) bench --locked $(AS_ROOT) --benches

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --test demo -- -D warnings
	@tests/generated.sh
	@tests/dependencies.sh

setup:
	@tests/setup.sh

# kube-apiserver and etcd, once: three minutes where they have to be built.
apiserver:
	@tests/kubernetes/apiserver.sh >/dev/null

clean-lab:
	@tests/clean-lab.sh
