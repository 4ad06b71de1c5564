# With the environment in .venv, or `make PYTHON=...`; what each does is in CONTRIBUTING.md.
PYTHON ?= $(if $(wildcard .venv),$(CURDIR)/.venv/bin/python,python3)

.PHONY: test lint versions bench record gpu api tables docs

test:
	$(PYTHON) -m pytest -n 2 --dist worksteal

lint:
	VENV=$$($(PYTHON) -c "import sys; print(sys.prefix)") bash .ci/run lint types workflows api

versions:
	$(PYTHON) -m nox -f .ci/noxfile.py -- benchmarks/results/versions.md

bench:
	$(PYTHON) -m benchmarks

# glibc keeps freed memory: else each step of a dense loss waits for the system's, for times that vary.
record:
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 $(PYTHON) -m benchmarks --out benchmarks/results --name two-cpu-cores
	$(MAKE) tables

gpu:
	$(PYTHON) -m benchmarks gpu --out benchmarks/results

api:
	$(PYTHON) .mkdocs/api.py

tables:
	$(PYTHON) .mkdocs/tables.py

docs:
	$(PYTHON) -m mkdocs build --strict -f .mkdocs/mkdocs.yml
