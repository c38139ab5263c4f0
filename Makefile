# make train: an environment in .venv, fastvae in it, and a first VAE. make test: its test suite. make sanitize: the
# tests of the C++ under the compiler's sanitizers.
# Options: PYTHON=python3.12 make train; ARGS="--data digits --epochs 3" make train

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
SOURCES = pyproject.toml CMakeLists.txt constraints.txt $(shell find fastvae kernels csrc -type f -not -name '*.pyc')

NATIVE_TESTS = loader loader_state transform sources sparse hostile_input fuzz torch_datasets mapped shapes elbo flips sampling totals tape \
    products ema

.PHONY: train test integration sanitize sanitize-native bench lint clean

train: $(VENV)/.installed
	$(BIN)/fastvae train --amp $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/pytest $(ARGS)

integration: $(VENV)/.installed-test,integration
	$(BIN)/pytest -m integration $(ARGS)

# The extension under AddressSanitizer and UndefinedBehaviorSanitizer, beside the one in the environment. Their own memory
# is more than one test allows itself.
sanitize: sanitize-native
	$(BIN)/python -m pip install --no-deps --no-build-isolation --upgrade --target build/sanitized . \
	    -C build-dir=build/address -C cmake.define.FASTVAE_SANITIZE=address,undefined
	PYTHONPATH="$(CURDIR)/build/sanitized" \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_sigbus=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(BIN)/pytest -p no:cacheprovider --capture=sys \
	    --deselect tests/test_mapped.py::test_a_file_of_several_times_the_memory \
	    $(wildcard $(NATIVE_TESTS:%=tests/test_%.py)) $(ARGS)

# The loader without Python, under ThreadSanitizer and under the other two.
sanitize-native: $(VENV)/.installed-dev
	for sanitizer in thread address,undefined; do \
	    $(BIN)/cmake -S tests/native -B build/native-$${sanitizer%,*} -DFASTVAE_SANITIZE=$$sanitizer && \
	    $(BIN)/cmake --build build/native-$${sanitizer%,*} && \
	    $(BIN)/ctest --test-dir build/native-$${sanitizer%,*} --output-on-failure || exit 1; \
	done

bench: $(VENV)/.installed-bench
	$(BIN)/pytest bench $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	@$(PYTHON) scripts/preflight.py
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --constraint constraints.txt .
	@touch $@

$(VENV)/.installed-%: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --constraint constraints.txt ".[$*]"
	@touch $(VENV)/.installed $@
