# The everyday commands. `make` alone lists them.

# How the demo and the benchmark are built, and what is built with them.
PROFILE ?= release
PACKAGES ?= -p candor
profile_folder = $(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
candor = target/$(profile_folder)/candor

.PHONY: help setup build test test-arm64 demo bench lint check-docs check-browser cuda cuda-tools cuda-proof cuda-table gpu-check

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

setup: ## install what is missing (GStreamer and its development files, by apt)
	@scripts/setup.sh

build: setup ## build the command line, target/release/candor
	cargo build --locked --profile $(PROFILE) $(PACKAGES)

cuda: setup ## build the command line with the kernels for every GPU (fetches CUDA's compilers by pip into .tools)
	@scripts/setup-cuda.sh thor
	CANDOR_CUDA=all cargo build --locked --profile $(PROFILE) $(PACKAGES)

cuda-tools: setup ## build candor-tools with training on a GPU (fetches CUDA's nvcc by pip into .tools, unless there is one)
	@scripts/setup-cuda.sh thor
	CANDOR_CUDA=all scripts/cuda-tools.sh build --profile $(PROFILE)

cuda-proof: setup ## run every test of the CUDA kernels that needs no GPU
	@scripts/cuda-proof.sh

gpu-check: setup ## prove the CUDA kernels on the GPU of this machine, and measure it (writes gpu-check.json)
	@scripts/gpu-check.sh

cuda-table: ## write docs/cuda-kernels.md, what each kernel takes on each GPU
	@scripts/setup-cuda.sh thor
	CANDOR_WRITE_TABLE=1 cargo test --locked --quiet -p candor-kernels --test cuda_table

test: setup ## run every test
	@scripts/test.sh

test-arm64: ## run the kernels' tests for 64-bit ARM under qemu (installs compilers and qemu by apt)
	@scripts/setup-arm64.sh
	@scripts/test-arm64.sh

demo: build ## run the default model over demo/sad-to-happy.mp4 and write demo.html
	$(candor) watch --html demo.html demo/sad-to-happy.mp4
	@echo "Now open demo.html in a browser."

bench: build ## time every stage of the default model
	$(candor) bench

lint: setup ## format, clippy, documentation, licences
	@scripts/lint.sh

check-docs: setup ## run the commands of the documentation, check its links and options
	cargo build --locked --workspace --bins --quiet
	@scripts/check-docs.py

check-browser: setup ## rate explanations in a real browser (installs chromium and chromedriver by apt)
	@scripts/setup.sh browser
	cargo build --locked --workspace --bins --quiet
	@tests/browser/check_rate.py
