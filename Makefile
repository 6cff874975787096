# make demo: watch adapters learn on YOLO-World.  make test: see the tests pass.  Needs only Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
ARGS ?=
# idle threads must not spin: a process next to others on few cores would be several times slower
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test quick mutants nightly benchmarks check format docs clean

help:
	@echo "make demo    install into $(VENV) and run the YOLO-World demo (about 10 minutes on 2 CPU cores)"
	@echo "make test    install into $(VENV) and run all tests (ARGS=... goes to pytest)"
	@echo "make quick   the tests without the slow ones"
	@echo "make mutants drop each field of ConvGeometry in turn and see a test fail (about a minute)"
	@echo "make nightly every merge form of every layer and kind, 20,000 property cases, 12,000 hostile files, interrupts, exports"
	@echo "make benchmarks  measure against full fine-tuning and peers, write docs/benchmarks.md (about 40 minutes)"
	@echo "make check   format and lint, types, doctests, quick tests"
	@echo "make docs    build the pages of docs/ into build/site"
	@echo "make clean   delete $(VENV), runs, caches and generated data"

# .installed-<extras> remembers what the environment holds; setup.cfg newer than it installs anew
$(VENV)/.installed-%: setup.cfg pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing convpeft[$*] into $(VENV) (PyTorch and friends: a minute or two, about 6 GB)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

demo: $(VENV)/.installed-example
	$(BIN)/python -m examples.yolo_world.demo $(ARGS)

test: $(VENV)/.installed-example,commands,detectors,trainers,test
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

quick: $(VENV)/.installed-example,commands,detectors,trainers,test
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

mutants: $(VENV)/.installed-example,commands,detectors,trainers,test
	$(BIN)/python -m tests.mutants

nightly: $(VENV)/.installed-example,commands,detectors,trainers,test
	$(BIN)/python -m pytest tests/merging tests/properties tests/files/test_hostile.py tests/injection/test_interrupts.py tests/usage tests/detectors tests/examples tests/integrations tests/commands tests/adapters --nightly -s $(ARGS)

benchmarks: $(VENV)/.installed-example,benchmarks
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks $(ARGS)  # waking threads that sleep would be measured

check: $(VENV)/.installed-example,commands,detectors,trainers,test,dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs .cache build
