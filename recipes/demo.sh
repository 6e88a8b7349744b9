#!/bin/sh
# What `make demo` runs: from this machine's own Python sources to a model directory that completes code.
set -e
step() { printf '\n== %s\n' "$1"; }
export OMP_NUM_THREADS=1

step "a tokenizer, trained on the standard library's sources (their held-out part left out)"
nemo-lite tokenizer train --source stdlib --vocab-size 4096 --validation-fraction 0.05 --out runs/demo-tokenizer/tokenizer.json

step "training: two processes, recipes/demo.yaml (run it again and it goes on where it stopped)"
torchrun --nproc-per-node 2 -m nemo_lite.train recipes/demo.yaml

step "export: a Hugging Face NemotronH directory, MTP tensors included"
nemo-lite export runs/demo --to runs/demo/model

step "evaluation on held-out files"
nemo-lite evaluate runs/demo/model --validation-fraction 0.05 --seq-len 256 --threads 2 --to runs/demo/evaluation

prompt='def read_config(path):
    """Read a configuration file and return'
step "a completion, token by token"
nemo-lite generate runs/demo/model --prompt "$prompt" --max-tokens 96 --stats --threads 2
step "the same completion, drafted by the model's own MTP block and verified"
nemo-lite generate runs/demo/model --prompt "$prompt" --max-tokens 96 --speculative mtp --stats --threads 2

printf '\nmodel   runs/demo/model\nreport  runs/demo/report.html and runs/demo/evaluation/evaluation.html (open them in a browser)\n'
