#!/bin/sh
# The whole job on the shipped checkpoint: analyze -> solve -> export -> generate -> check. Run by `make demo`.
set -eu
model=$1
out=$2
mkdir -p "$out"

step() {
    printf '\n==> %s\n' "$1"
    shift
    printf '    $ %s\n\n' "$*"
    "$@"
}

step 'What does every layer cost? Sizes come from the file headers; no weight is read.' \
    llamaplan analyze "$model" --ctx-size 512

step 'Cut it over two unlike GPUs and a CPU (made up, tiny on purpose: no two of them can hold it). Proved optimal.' \
    llamaplan solve "$model" --strategy mixed --cluster plans/examples/demo.json --ctx-size 512 \
    --prompt-tokens 64 --new-tokens 64 -o "$out/plan.json"

step 'Write one bundle per stage. The folder is still an ordinary Hugging Face checkpoint.' \
    llamaplan export "$out/plan.json" --model "$model" -o "$out/shards" --force

step 'Run the stages as a chain. The GPUs do not exist here, so every stage is mapped to this CPU.' \
    llamarun generate "$out/shards" --device-map cpu -p 'def __init__(self, ' -n 60 --temp 0.7 --seed 1

step 'Is the chain really the unsplit model? Compare with transformers, bit for bit.' \
    llamarun check "$out/shards" --against "$model" --device-map cpu

printf '\nDone. Everything lies in %s/; try your own: llamaplan solve --help\n' "$out"
