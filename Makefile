# `make help` explains every target.
PYTHON ?= python3
SHELL := /bin/bash
export EHR_CACHE ?= $(CURDIR)/.cache

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: install demo test lint format bench bench-full check-data check-mutants check-ranks check-sweep gpu-check clean help

install: .venv/.installed ## set up .venv with pinned packages (the other targets do it themselves)

demo: .venv/.installed ## simulated raw tables -> cohort -> trained model -> zero-shot and fine-tuned scores on a second system
	.venv/bin/ehr train -c experiments/configs/demo.yaml --finetune SyntheticEICU --resume

test: lint ## lint, then all tests (real open data are used where they are there)
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/.installed ## let ruff sort imports and lay out the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv-bench/.installed: pyproject.toml constraints.txt # what the scan is compared with; mamba-ssm without its CUDA kernels, for its reference
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -q -c constraints.txt -e '.[bench]'
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv-bench/bin/pip install -q --no-deps --no-build-isolation -c constraints.txt mamba-ssm \
		|| echo 'mamba-ssm does not install: the comparison with it is left out'
	touch $@

bench: .venv/.installed .venv-bench/.installed ## time and memory of `ehr prepare`, of the scan and of training, beside others, and how long one stay takes (ROOT=folder of PhysioNet 2012)
	.venv/bin/python -m experiments.benchmarks.bench
	.venv-bench/bin/python -m experiments.benchmarks.bench_scan
	.venv/bin/python -m experiments.benchmarks.bench_models $(if $(ROOT),--root $(ROOT))
	.venv/bin/python -m experiments.benchmarks.bench_latency

bench-full: .venv/.installed ## time and memory of `ehr prepare` on simulated files of the real databases' size (hours, 40 GB)
	.venv/bin/python -m experiments.benchmarks.bench_full

check-data: .venv/.installed ## definitions of sepsis and infusion rates on the open demos (ROOT=folder with mimic-iv-demo and eicu-demo)
	.venv/bin/python -m experiments.benchmarks.check_data $(ROOT)
	.venv/bin/python -m experiments.results.tables

check-mutants: .venv/.installed ## do the tests of the data layer notice a wrong line? (10 minutes)
	.venv/bin/python tests/mutants.py

check-ranks: .venv/.installed ## several processes beside one, and training killed 20 times beside training that was not (5 minutes)
	.venv/bin/python -m experiments.benchmarks.check_ranks

check-sweep: .venv/.installed ## kill the processes of sweeps at random, on a journal file and on PostgreSQL, and time sweeps
	.venv/bin/python -m experiments.benchmarks.check_sweep

gpu-check: .venv/.installed ## on a CUDA machine: check scans, training, resuming there, and time all (MINUTES=2 or 10, KERNELS=folder of built ones, ROOT=PhysioNet 2012)
	.venv/bin/python -m experiments.benchmarks.gpu_check $(if $(MINUTES),--minutes $(MINUTES)) $(if $(KERNELS),--kernels $(KERNELS)) $(if $(ROOT),--root $(ROOT))
	.venv/bin/python -m experiments.results.tables

clean: ## remove the environment, caches and the demo's run and data
	rm -rf .venv .venv-bench .cache .mypy_cache .ruff_cache .pytest_cache runs/demo data/synthetic-mimiciv data/synthetic-eicu

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.DEFAULT_GOAL := help
