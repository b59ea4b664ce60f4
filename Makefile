# `make help` lists the targets: what stands behind ## is what it says of one.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# pip, which says what it is at.
INSTALL = $(PYTHON) tools/install.py

.PHONY: help setup compare demo test test-full test-gpu-offline test-vllm test-ray asan wheels dist docs portable check benchmarks consumer ladder study gates rates ablation test-lowest test-newest
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target says; do printf 'make %-16s %s\n' "$$target" "$$says"; done

setup: $(READY) ## the environment .venv alone

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffattn: $$($(PYTHON) --version) given, Python 3.11 or newer wanted: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "make: making .venv, an environment of its own for $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "make: installing what constraints.txt pins: torch and about 220 other packages, some minutes"
	@$(INSTALL) $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo "make: .venv is ready"

compare: $(READY) ## the main job: train softmax, V1 and V2, and write a report
	$(BIN)/diffattn compare $(ARGS)

# Of the newest comparison: its first V2 model beside the softmax model that it replaces.
NEWEST = $(patsubst %/softmax-seed0/model/config.json,%,$(firstword $(shell ls -t runs/*/softmax-seed0/model/config.json 2>/dev/null)))
demo: $(READY) ## a web page in which models of the newest make compare run
	@test -n "$(NEWEST)" || { echo "make: no finished comparison in runs given, one wanted: make compare" >&2; exit 2; }
	$(BIN)/diffattn demo $(NEWEST)/diff_v2-seed0/model $(NEWEST)/softmax-seed0/model --out demo.html $(ARGS)

# One torch thread in each of two processes: two threads in one are slower on tensors of this size.
test: $(READY) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Sweeps, the tools of docs/ecosystem.md, and SmolLM2-135M: minutes. Tests whose tool is absent say so and are skipped.
test-full: .venv-tools/ready ## sweeps, other tools, and real weights, in .venv-tools
	OMP_NUM_THREADS=2 .venv-tools/bin/python -m pytest -m "full or smollm2" --timeout 1200 $(ARGS)

# It sees what .venv holds, torch too, and has the tools beside that: none of them may bring a torch of its own.
.venv-tools/ready: $(READY) benchmarks/tools_requirements.txt
	$(BIN)/python -m venv .venv-tools
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-tools/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@echo "make: installing the tools of docs/ecosystem.md and SmolLM2-135M into .venv-tools, about 200 MB"
	@$(INSTALL) .venv-tools/bin/python --no-deps --requirement benchmarks/tools_requirements.txt
	@touch $@

# About 600 kernels, a second or two each: 15 minutes of one core where none has a row that holds. Call it again to go on.
test-gpu-offline: $(READY) ## the Triton kernels compiled for every GPU of the block tables, without one
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.gpu_offline --out benchmarks/results/gpu_offline.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops/triton/test_offline.py

# On the machine itself, where each test starts Ray or plays several machines: about ten minutes of two cores.
test-ray: $(READY) ## the tests that start Ray on this machine
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.ray_tests --out benchmarks/results/ray.jsonl

# vLLM wants an environment apart (3.4 GB); the comparison takes about 10 minutes and writes its rows.
test-vllm: .venv-vllm/ready ## the models in vLLM beside generate, in .venv-vllm
	.venv-vllm/bin/python -m benchmarks.vllm_tokens --out benchmarks/results/vllm.jsonl
	.venv-vllm/bin/python -m benchmarks.vllm_requests --python $(BIN)/python --out benchmarks/results/vllm_requests.jsonl

.venv-vllm/ready: benchmarks/vllm_requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	@echo "make: installing vLLM into .venv-vllm, 3.4 GB"
	@$(INSTALL) .venv-vllm/bin/python --no-deps --requirement benchmarks/vllm_requirements.txt
	@$(INSTALL) .venv-vllm/bin/python --no-deps --editable .
	@touch $@

# The compiled kernel under AddressSanitizer and UBSan: about a minute.
asan: $(READY) ## the kernel under AddressSanitizer and UBSan
	PYTHONPATH=tests $(BIN)/python -m support.asan_fused_cpu

# A wheel with the kernel compiled for each instruction set, in dist/: about a minute and a half.
wheels: $(READY) ## the wheel that carries the compiled kernel, in dist/
	$(BIN)/python -m tools.wheels --out dist $(ARGS)

# Other compilers, and processors that qemu emulates: a quarter of an hour. What is not installed is named in its row.
# AARCH64 is the folder that tools/aarch64_root.sh makes (6 GB); without it those cases say that it is absent.
portable: $(READY) ## the kernel through other compilers and emulated processors
	$(BIN)/python -m tools.portability $(if $(AARCH64),--aarch64 $(AARCH64)) --out benchmarks/results/portability.jsonl $(ARGS)

# The source archive and the wheel in dist/, checked, installed into a new environment and run there: docs/release.md.
dist: $(READY) ## the files of a release in dist/, checked, installed and run
	$(BIN)/python -m tools.dist --out dist $(ARGS)

# The documentation as a site in site/ that needs no network; a warning is an error. The two variables still the
# advertisements of two packages.
docs: $(READY) ## the documentation as a site in site/
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs --quiet build --strict --site-dir $(or $(SITE),site)
	@echo "make: open $(or $(SITE),site)/index.html"

check: $(READY) ## style, types, imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

benchmarks: $(READY) ## measured ratios of this machine
	$(BIN)/python -m benchmarks.training_step --out benchmarks/results/training_step.jsonl
	$(BIN)/python -m benchmarks.attention --out benchmarks/results/attention.jsonl
	$(BIN)/python -m benchmarks.startup --out benchmarks/results/startup.jsonl

# llama.cpp is built from its sources, for this processor: a quarter of an hour of two cores, once. Then what has no row yet is
# measured: half an hour of two idle cores, most of it to export the models. PAIR is two trained folders of ours, of which one
# is softmax, and TEXT the text that they were trained on; without them SmolLM2-135M alone.
LLAMA_BUILD := $(CURDIR)/.venv-consumer/build
CONSUMER := .venv-consumer/bin/python -m benchmarks.consumer --llama-bench $(LLAMA_BUILD)/bin/llama-bench \
	--out benchmarks/results/consumer.jsonl
consumer: .venv-consumer/ready ## small machines: our models beside llama.cpp, in .venv-consumer
	@test -z "$(PAIR)" || test -f "$(TEXT)" || { echo "make: TEXT='$(TEXT)' given, a text file wanted: make consumer PAIR='softmax/model diff_v2/model' TEXT=eltec_eng.txt.xz" >&2; exit 2; }
	.venv-consumer/bin/python -m pytest -q tests/benchmarks/test_consumer.py
	$(CONSUMER) smollm2 $(ARGS)
	$(if $(PAIR),$(CONSUMER) $(PAIR) --name 30M --text $(TEXT) --tokens 16384 $(ARGS))
	$(BIN)/python -m benchmarks.machines

.venv-consumer/ready: $(READY) benchmarks/consumer_requirements.txt
	$(BIN)/python -m venv .venv-consumer
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$(.venv-consumer/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@echo "make: building llama.cpp in .venv-consumer, a quarter of an hour"
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON" $(INSTALL) .venv-consumer/bin/python --no-deps \
		--config-settings build-dir=$(LLAMA_BUILD) --config-settings "build.targets=llama;llama-bench;mtmd" \
		--requirement benchmarks/consumer_requirements.txt
	@touch $@

# That train at once, for the targets that take hours: one a core, and on a GPU no more than it holds.
PROCESSES := 2

# The rows of docs/scaling.md: hours. TEXT is the English part of ELTeC as one file.
# Runs that have a row in benchmarks/results are skipped; call it again to go on.
ladder: $(READY) ## hours: the rows of docs/scaling.md
	@test -f "$(TEXT)" || { echo "make: TEXT='$(TEXT)' given, a text file wanted: make ladder TEXT=eltec_eng.txt.xz" >&2; exit 2; }
	mkdir -p runs/ladder
	test -f runs/ladder/rows.jsonl || cp benchmarks/results/ladder.jsonl runs/ladder/rows.jsonl
	$(BIN)/diffattn scale run --text $(TEXT) --out runs/ladder --dtype bfloat16 --processes $(PROCESSES)
	cp runs/ladder/rows.jsonl benchmarks/results/ladder.jsonl

# Models to be studied, and every study of them: a night. Call it again to go on: models that have their rows are neither trained nor measured again.
STUDY_DATA := --tokens 10M --vocab-size 4096 --context 1024 --needles 0.6 --batch-size 1 --dtype bfloat16
STUDY := --sizes 4M --variants softmax diff_v1 diff_v2 gated $(STUDY_DATA)
study: $(READY) ## hours: the rows of docs/findings.md
	@test -f "$(TEXT)" || { echo "make: TEXT='$(TEXT)' given, a text file wanted: make study TEXT=eltec_eng.txt.xz" >&2; exit 2; }
	mkdir -p runs/study
	test -f runs/study/rows.jsonl || test ! -f benchmarks/results/study.jsonl || cp benchmarks/results/study.jsonl runs/study/rows.jsonl
	$(BIN)/diffattn scale run $(STUDY) --text $(TEXT) --out runs/study --processes $(PROCESSES)
	cp runs/study/rows.jsonl benchmarks/results/study.jsonl
	OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks.findings --runs runs/study --text $(TEXT) --out benchmarks/results/findings.jsonl
	$(BIN)/python -m benchmarks.findings --out benchmarks/results/findings.jsonl --table --charts docs/findings --only "training loss" retrieval noise outliers "long_context, 4 times as long"

# Whether small gated models look something up, by learning rate and start: about an hour of one core. Call it again to go on.
gates: $(READY) ## an hour: gated models that look something up
	@test -f "$(TEXT)" || { echo "make: TEXT='$(TEXT)' given, a text file wanted: make gates TEXT=eltec_eng.txt.xz" >&2; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gate_study --text $(TEXT) --out benchmarks/results/gated.jsonl $(ARGS)

# The models of the study at four learning rates, two seeds each: an hour or two of a GPU, days of two cores. Call it again to go on.
RATES := $(foreach seed,0 1,$(foreach times,0.5 1 2 4,$(foreach kind,gated softmax diff_v1 diff_v2,$(kind):$(times)::$(seed))))
rates: $(READY) ## hours of a GPU: the study at other learning rates
	@test -f "$(TEXT)" || { echo "make: TEXT='$(TEXT)' given, a text file wanted: make rates TEXT=eltec_eng.txt.xz" >&2; exit 2; }
	$(BIN)/python -m benchmarks.gate_study --text $(TEXT) --out benchmarks/results/gated.jsonl --runs runs/rates --size 4M $(STUDY_DATA) --cases $(RATES)

# One thing changed at a time, 36 runs: hours. Call it again to go on.
ablation: $(READY) ## hours: one thing changed at a time
	@test -f "$(TEXT)" || { echo "make: TEXT='$(TEXT)' given, a text file wanted: make ablation TEXT=eltec_eng.txt.xz" >&2; exit 2; }
	mkdir -p runs/ablation
	test -f runs/ablation/rows.jsonl || test ! -f benchmarks/results/ablation.jsonl || cp benchmarks/results/ablation.jsonl runs/ablation/rows.jsonl
	$(BIN)/diffattn eval ablation --text $(TEXT) --out runs/ablation --dtype bfloat16 --processes $(PROCESSES)
	cp runs/ablation/rows.jsonl benchmarks/results/ablation.jsonl
	$(BIN)/diffattn eval ablation --text $(TEXT) --out runs/ablation --dtype bfloat16 --png docs/findings/ablation.png

# Apart from .venv: the newest release of transformers, also where pyproject.toml does not allow it yet. The row says what
# fails with it; an hour on two cores, less with ARGS="tests/model tests/serve".
test-newest: ## the tests with the newest transformers
	$(PYTHON) -m venv .venv-newest
	@echo "make: installing what constraints.txt pins into .venv-newest, then the newest transformers"
	@$(INSTALL) .venv-newest/bin/python --constraint constraints.txt --editable '.[dev]'
	@$(INSTALL) .venv-newest/bin/python --upgrade transformers
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m tools.newest --out benchmarks/results/newest.jsonl $(ARGS)

# Apart from .venv: the lowest releases that pyproject.toml allows.
test-lowest: ## the tests with the lowest releases that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest
	@echo "make: installing what constraints-lowest.txt pins into .venv-lowest"
	@$(INSTALL) .venv-lowest/bin/python --constraint constraints-lowest.txt --editable . pytest pytest-timeout pytest-xdist hypothesis
	.venv-lowest/bin/python -m pytest $(ARGS)
