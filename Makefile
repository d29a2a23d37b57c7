# Everything is built and tested from here. `make` alone lists the targets.
SHELL := /bin/bash
GO ?= go
BIN := bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
RUN ?= .
export CGO_ENABLED ?= 0

.PHONY: help
help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

.PHONY: deps
deps: ## install the Debian packages that building, running and testing need
	@./tools/deps.sh

.PHONY: build
build: ## build bin/skep, the containerd shim, the pinned containerd and the example image
	@mkdir -p $(BIN)
	$(GO) build -trimpath -ldflags "$(LDFLAGS)" -o $(BIN)/skep ./cmd/skep
	@./tools/containerd/build.sh $(BIN)
	@./examples/hello/build.sh $(BIN)

.PHONY: up
up: deps build ## start a node on this machine, deploy examples/hello and show it working
	@./examples/hello/up.sh $(BIN)

.PHONY: down
down: ## stop the node and everything it runs
	$(BIN)/skep down

.PHONY: test
test: deps check e2e ## everything that CI runs: check and e2e

.PHONY: check
check: fmt-check lint tidy unit ## format, lint, tidy, unit, property and golden tests

.PHONY: fmt
fmt: $(BIN)/golangci-lint ## format the source
	$(BIN)/golangci-lint fmt

.PHONY: fmt-check
fmt-check: $(BIN)/golangci-lint
	@diff=$$($(BIN)/golangci-lint fmt --diff); if [ -n "$$diff" ]; then echo "$$diff"; echo "run make fmt"; exit 1; fi

.PHONY: lint
lint: $(BIN)/golangci-lint ## run the linters
	$(BIN)/golangci-lint run ./...

.PHONY: tidy
tidy: ## check that go.mod is tidy
	@$(GO) mod tidy -diff >/dev/null || { echo "go.mod is not tidy: run go mod tidy"; exit 1; }

.PHONY: unit
unit: build ## unit, property, golden and simulation tests
	$(GO) test -timeout 15m $$($(GO) list ./... | grep -v -e /e2e -e /bench)

.PHONY: race
race: build ## unit tests under the race detector (needs cgo)
	CGO_ENABLED=1 $(GO) test -race -timeout 30m $$($(GO) list ./... | grep -v -e /e2e -e /bench)

.PHONY: e2e
e2e: build ## end-to-end tests: real daemons, containers, namespaces and docker client (root)
	@command -v docker >/dev/null || ./tools/docker-engine.sh $(BIN)/docker-engine
	@./tools/deps.sh qemu-system-x86_64:qemu-system-x86 || echo "no QEMU: what needs another kernel is skipped"
	@./tools/deps.sh cfssl:golang-cfssl nsenter:util-linux # which TestExternalCA needs
	PATH="$$PATH:$(CURDIR)/$(BIN)/docker-engine/usr/bin" $(GO) test -count=1 -timeout 50m -v -run '$(RUN)' -skip '^TestInterop' ./e2e

.PHONY: interop
interop: deps build ## tests with Debian's Docker Engine as a member and as a manager (root)
	@./tools/deps.sh iptables:iptables # which Docker Engine needs
	@./tools/docker-engine.sh $(BIN)/docker-engine
	PATH="$$PATH:$(CURDIR)/$(BIN)/docker-engine/usr/bin" $(GO) test -count=1 -timeout 15m -v -run '^TestInterop' ./e2e

.PHONY: bench
bench: deps build ## print the benchmark table and write bench/results (root)
	@./tools/deps.sh iptables:iptables # which Docker Engine needs
	$(GO) run ./bench -bin $(BIN)

.PHONY: sim
sim: ## simulate whole swarms with faults for FOR (default 30m of their time) from SEED (default: the clock)
	@seed=$(or $(SEED),$$(date +%s)); echo "seed $$seed"; \
	$(GO) test -count=1 -timeout 60m ./sim -run 'TestRandom' -seed $$seed -for $(or $(FOR),30m)

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME (default 20s)
	@./tools/fuzz.sh $(or $(FUZZTIME),20s)

.PHONY: generate
generate: ## regenerate api from its .proto files with the pinned generators
	./api/generate.sh

$(BIN)/golangci-lint: tools/golangci-lint/go.mod
	@mkdir -p $(BIN)
	cd tools/golangci-lint && $(GO) build -o ../../$(BIN)/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: clean
clean: ## remove what was built
	rm -rf $(BIN)
