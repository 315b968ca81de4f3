# SPDX-License-Identifier: Apache-2.0
#
# Every target has a help line after two hashes. What needs more than a line of
# shell is in scripts/.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

GO ?= go
export GO

# The major version of clang that the committed BPF objects were made with.
# Another one makes other bytes.
export BPF_CLANG := 14

# Off only where the race detector is not to be had.
RACE ?= -race
export RACE

# PRIVILEGED=0 leaves the privileged tests out, loudly.
PRIVILEGED ?= 1
export PRIVILEGED

# Packages that test-unit, test-race, test-privileged and bench look at.
PKG ?= ./...
BENCH ?= .
FUZZTIME ?= 10s
export FUZZTIME

VERSION ?= $(shell scripts/version)
# Names and symbols of the linker are left out; Go's own tracebacks need none.
GO_BUILD = CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
COMMANDS = $(notdir $(wildcard cmd/*))
IMAGE ?= latchkey:$(VERSION)

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-zA-Z0-9_-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: VERSION PKG BENCH FUZZTIME IMAGE SUITES KERNELS, RACE= (no race detector), PRIVILEGED=0, KEEP=1 (demo)"

.PHONY: all
all: generate build lint test-unit ## Generate, build, lint, unit tests

.PHONY: setup
setup: ## Install the tools that the tests need (Debian packages; as root)
	@scripts/setup

.PHONY: generate
generate: ## Compile the BPF programs and their Go types
	@scripts/generate bpf

.PHONY: check-generated
check-generated: ## Fail if the committed BPF objects are not what the sources give
	@scripts/stage check-generated scripts/check-generated

.PHONY: build
build: ## Build static binaries of every command into bin/
	@if [ -z "$(COMMANDS)" ]; then echo "nothing below cmd/ to build" >&2; exit 1; fi
	@mkdir -p bin
	@for c in $(COMMANDS); do \
		echo "building bin/$$c $(VERSION)"; \
		$(GO_BUILD) -o "bin/$$c" "./cmd/$$c"; \
	done

.PHONY: demo
demo: ## Show it work on a node of its own (needs root); KEEP=1 leaves it running
	@echo "Building. The first build compiles every dependency and takes minutes; later ones take seconds."
	@$(MAKE) build
	@echo "building bin/awsgo (a client that uses aws-sdk-go-v2)"
	@$(GO_BUILD) -o bin/awsgo ./test/clients/awsgo
	@echo "building bin/latchkey-demo"
	@$(GO_BUILD) -o bin/latchkey-demo ./demo
	@scripts/as-root env KEEP="$${KEEP:-}" bin/latchkey-demo

.PHONY: test
test: setup lint check-generated test-race test-allocations test-privileged ## Everything: set-up, lint, generated files, unit and privileged tests

.PHONY: test-unit
test-unit: ## Unit tests, without the race detector
	@scripts/stage test-unit $(GO) test $(PKG)

.PHONY: test-race
test-race: ## Unit tests with the race detector
	@scripts/stage test-race $(GO) test $(RACE) $(PKG)

.PHONY: test-allocations
test-allocations: ## That a cached answer allocates nothing, which the race detector would hide
	@scripts/stage test-allocations $(GO) test -count=1 -run AllocatesNothing -v ./pkg/agent

.PHONY: test-privileged
test-privileged: ## Tests on the real kernel (needs root, BTF and cgroup v2)
	@scripts/stage test-privileged scripts/test-privileged $(filter-out ./...,$(PKG))

.PHONY: attacks
attacks: ## Every attack of the threat model, and that it succeeds without its protection
	@scripts/stage attacks scripts/test-privileged ./test/attacks

.PHONY: test-kernels
test-kernels: ## Privileged tests and attacks on every kernel; KERNELS= chooses (boots them with qemu)
	@scripts/stage test-kernels scripts/kernel-matrix $(KERNELS)

.PHONY: docs-kernels
docs-kernels: ## Run every kernel and write docs/kernels.md from it, with the cost of the hooks
	@DOCS=1 scripts/stage docs-kernels scripts/kernel-matrix
	@scripts/as-root $(GO) run ./test/kernel/hookcost -write docs/kernels.md

.PHONY: e2e
e2e: ## A real single-node Kubernetes, the chart on it, and every suite (root); SUITES= chooses
	@scripts/stage e2e test/suites/run $(SUITES)

.PHONY: e2e-variants
e2e-variants: ## The cluster suites on the newer runtime with systemd's cgroup names, and on cgroup v2 alone
	@scripts/stage e2e-systemd test/suites/run --runtime new --cgroups systemd --cni ptp $(SUITES)
	@scripts/stage e2e-v2 test/suites/run --cgroups v2 $(SUITES)

.PHONY: crashes
crashes: ## Kill the store and the server 200 times each under writes, and compare
	@LATCHKEY_CRASHES=200 scripts/stage crashes-store $(GO) test -count=1 -timeout 30m -run Crash ./pkg/association
	@LATCHKEY_KILLS=200 scripts/stage crashes-server $(GO) test -count=1 -timeout 30m -run Kill ./test/server

.PHONY: manifests
manifests: ## Render deploy/manifests from the chart, and the chart's golden files
	@$(GO) test -count=1 ./test/chart -update

.PHONY: docs
docs: ## Write what is generated of the documents: the CLI's manual, the table of metrics
	@$(GO) test -count=1 ./pkg/agent -run TestMetricsDocument -update
	@LATCHKEY_UPDATE=1 $(GO) test -count=1 ./cmd/latchkey -run TestReferenceIsCurrent

.PHONY: ci-full
ci-full: test attacks test-kernels e2e e2e-variants crashes fuzz bench ## All that there is: CI and what is too long for it

.PHONY: lint
lint: ## Formatting, vet, staticcheck, shellcheck and the rules of the repository
	@scripts/stage lint scripts/lint

.PHONY: fmt
fmt: ## Format Go and C
	@find . -name '*.go' -not -path '*/node_modules/*' -print0 | xargs -0 gofmt -w
	@find bpf -name '*.[ch]' -print0 | xargs -0 clang-format -i

.PHONY: bench
bench: ## Benchmarks of the packages PKG (BENCH chooses by regular expression)
	@$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem $(PKG)

.PHONY: bench-node
bench-node: ## Measure a whole node against nginx, and write docs/benchmarks.md (root, quiet machine)
	@scripts/setup bench
	@scripts/as-root $(GO) run ./bench -o docs/benchmarks.md
	@scripts/as-root $(GO) run ./test/kernel/hookcost -write docs/benchmarks.md

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME
	@scripts/stage fuzz scripts/fuzz

.PHONY: docker
docker: ## Build both images (needs a container engine); IMAGE names the agent's
	docker build --build-arg VERSION=$(VERSION) --target agent -t $(IMAGE) .
	docker build --build-arg VERSION=$(VERSION) --target server -t $(subst latchkey:,latchkey-server:,$(IMAGE)) .

.PHONY: clean
clean: ## Remove what was built
	@rm -rf bin dist
