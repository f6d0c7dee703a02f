# What is done often, by name. After the first run of a target (which sets up what it needs, by
# scripts/bootstrap.sh) all of this works offline.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

CARGO ?= cargo
# Long runs, in seconds.
TORTURE_SECONDS ?= 600
FUZZ_SECONDS ?= 60
ROUNDS ?= 1
# Empty: the commit's own number.
SEED ?=
# The simulator's seeds.
SEEDS ?= 1000
FIRST_SEED ?= 1
MUTANT_SEEDS ?= 2000
TARGET := $(or $(CARGO_TARGET_DIR),target)
# A host finds the filter library under this name; cargo allows no hyphen in a library's name.
LIBRARY := libvmiof-disk-jetdr.so
# The host's package: where it goes, its release date (the commit's, so that a commit has one package),
# and what signs it, if anything does.
OUT ?= $(TARGET)/vib
VIB_VERSION ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)-1
VIB_DATE ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
KEY ?=
CERT ?=

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

.PHONY: demo
demo: release ## Build, then protect, kill and recover a virtual machine's disks (no root needed)
	$(TARGET)/release/jetdr demo

.PHONY: build
build: ## Debug build: the command, the daemon and the filter library
	$(CARGO) build --locked
	ln -sf libvaio_shim.so $(TARGET)/debug/$(LIBRARY)

.PHONY: release
release: ## Release build of the same
	@scripts/bootstrap.sh demo
	$(CARGO) build --locked --release
	ln -sf libvaio_shim.so $(TARGET)/release/$(LIBRARY)

.PHONY: host-objects
host-objects: ## Build what a host gets, linked for GLIBC 2.17, and check it
	@scripts/bootstrap.sh vib
	scripts/host-objects.sh $(TARGET)/host-objects

.PHONY: vib
vib: host-objects build ## Build the host's package and its offline bundle into OUT; signed if KEY= and CERT= are given
	$(TARGET)/debug/jetdr vib build --library $(TARGET)/host-objects/$(LIBRARY) --daemon $(TARGET)/host-objects/iofilterd-jetdr \
		--package-version $(VIB_VERSION) --date $(VIB_DATE) --out $(OUT) $(if $(KEY),--level partner --key $(KEY) --cert $(CERT))
	$(TARGET)/debug/jetdr vib bundle $(OUT)/JetDR_bootbank_jetdr_$(VIB_VERSION).vib --out $(OUT)

.PHONY: test
test: test-setup loom build-all host-objects doctest nextest ## All tests: doc tests, model checker, unit, conformance and end-to-end tests, short torture

.PHONY: test-setup
test-setup:
	@scripts/bootstrap.sh test

# All targets at once: with a selection of packages the dependencies would have other features, and
# be built once more.
.PHONY: build-all
build-all:
	$(CARGO) build --locked --workspace --all-targets
	ln -sf libvaio_shim.so $(TARGET)/debug/$(LIBRARY)

.PHONY: nextest
nextest: build-all
	$(CARGO) nextest run --locked --workspace

.PHONY: doctest
doctest:
	$(CARGO) test --locked --workspace --doc --quiet

.PHONY: loom
loom: ## Model-check the lane and the sync: every interleaving, and the mutants that must fail
	RUSTFLAGS="--cfg loom" $(CARGO) test --locked --release -p filter-core --test loom_lane --test loom_sync --test loom_cut --target-dir $(TARGET)/loom

.PHONY: lint
lint: fmt clippy doc tidy ## Format, clippy, documentation, tidiness of the repository

.PHONY: fmt
fmt:
	$(CARGO) fmt --all --check

.PHONY: clippy
clippy:
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

# With the examples named, dependencies have the features that clippy and the tests build them with;
# else a quarter of them would be looked at once more. Programs that are called like their library are
# documented with it.
.PHONY: doc
doc:
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items \
		--lib --examples --bin jetdr --bin bench --bin iofilterd-jetdr

.PHONY: tidy
tidy:
	$(CARGO) test --locked --quiet --test tidy

.PHONY: no-std
no-std: ## Build the core for a target that has no operating system
	$(CARGO) build --locked -p filter-core --target x86_64-unknown-none

.PHONY: torture
torture: test-setup build-all ## Kill both sides of lanes for TORTURE_SECONDS (600) under load
	JETDR_TORTURE_SECONDS=$(TORTURE_SECONDS) $(CARGO) nextest run --locked --release --workspace \
		--profile long --no-capture -E 'test(/torture/)'

.PHONY: chaos
chaos: test-setup build-all ## The whole kill matrix, ROUNDS (1) times from SEED, with a table at the end
	@rm -f $(TARGET)/chaos.txt
	status=0; env JETDR_CHAOS_ROUNDS=$(ROUNDS) $(if $(SEED),JETDR_SEED=$(SEED)) JETDR_CHAOS_TABLE=$(abspath $(TARGET))/chaos.txt \
		$(CARGO) nextest run --locked --workspace -E 'binary(chaos)' --profile long || status=$$?; \
		printf '%s\n' '' '| victim | while | where | writes | defer, ms | allow, ms | write, ms | took, s |' '|---|---|---|---|---|---|---|---|'; \
		sort $(TARGET)/chaos.txt; exit $$status

.PHONY: figures
figures: test-setup build-all release ## Measure what recovery costs and what a guest notices of a sync; prints one table
	$(CARGO) build --locked --release -p benches
	@rm -f $(TARGET)/figures.txt
	JETDR=$(abspath $(TARGET))/release/jetdr JETDR_FIGURES=1 JETDR_FIGURES_TABLE=$(abspath $(TARGET))/figures.txt \
		$(CARGO) nextest run --locked --workspace -E 'binary(figures)' --profile long --no-capture
	$(TARGET)/release/bench yield --rows --runs 2 --seconds 10 >> $(TARGET)/figures.txt
	@printf '%s\n' '' '| figure | value | beside | ratio |' '|---|---|---|---|'; cat $(TARGET)/figures.txt

.PHONY: simulate
simulate: ## Simulate SEEDS (1000) seeds from FIRST_SEED (1) on; the first violation ends it
	$(CARGO) build --locked --release -p simulator
	$(TARGET)/release/simulator --seeds $(SEEDS) --first-seed $(FIRST_SEED)

.PHONY: simulate-mutants
simulate-mutants: ## Take out one guard after the other until a seed fails; print the table
	scripts/mutants.sh $(MUTANT_SEEDS)

.PHONY: fuzz
fuzz: test-setup build-all ## Run each fuzz target for FUZZ_SECONDS (60) on random input
	scripts/fuzz.sh $(FUZZ_SECONDS)

.PHONY: bench
bench: release ## Benchmarks with their peers beside them, one table at the end (JSON=1: as JSON)
	@scripts/bootstrap.sh bench
	$(CARGO) build --locked --release -p benches
	JSON=$(JSON) $(TARGET)/release/bench $(BENCH)

.PHONY: bindings
bindings: ## Make include/bindings.rs anew from include/iofilter.h (needs libclang)
	$(CARGO) run --locked --quiet -p conformance --example bindings

.PHONY: bindings-check
bindings-check: build-all ## Compare include/bindings.rs with include/iofilter.h
	$(TARGET)/debug/examples/bindings --check
	@echo "include/bindings.rs matches include/iofilter.h"

.PHONY: openapi
openapi: ## Make docs/msa-openapi.json anew from the management server's routes
	$(CARGO) run --locked --quiet -p msa -- openapi > $(TARGET)/msa-openapi.json
	mv $(TARGET)/msa-openapi.json docs/msa-openapi.json

.PHONY: deny
deny: ## Licences, sources, duplicate and banned crates, known vulnerabilities (needs cargo-deny)
	scripts/deny.sh

.PHONY: clean
clean: ## Remove what was built
	$(CARGO) clean
