# make demo   makes the environment and runs the main job: train, prune, export, compare
# make test   makes the environment and runs every check that CI runs

PYTHON ?= python3
VENV := .venv
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python -m dgate_wrap demo

test: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
test: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
test: $(VENV)/dev.stamp
	pre-commit run --all-files
	python -m pytest -n 2 --dist worksteal

# torch first and by itself: once it is there, no later requirement makes pip choose another build of it
$(VENV)/%.stamp: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet '$(TORCH)'
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
