#!/bin/sh
# The whole job on the shipped checkpoint: analyze -> solve -> export -> generate -> check. Run by `make demo`.
set -eu
model=$1
out=$2
mkdir -p "$out"

step() {
    printf '\n==> %s\n    $ %s\n\n' "$1" "$2"
    sh -c "$2"
}

step 'What does every layer cost? Sizes come from the file headers; no weight is read.' \
    "llamaplan analyze $model --ctx-size 512"

step 'Cut it over two unlike GPUs and a CPU (made up, and tiny on purpose: no two of them hold the model).' \
    "llamaplan solve $model --strategy mixed --cluster plans/examples/demo.json \
      --ctx-size 512 --prompt-tokens 64 --new-tokens 64 -o $out/plan.json"

step 'Write one bundle per stage. The folder is still an ordinary Hugging Face checkpoint.' \
    "llamaplan export $out/plan.json --model $model -o $out/shards --force"

step 'Run the stages as a chain. Those GPUs are not here, so every stage is mapped to this CPU.' \
    "llamarun generate $out/shards --device-map cpu -p 'def __init__(self, ' -n 80 --temp 0.7 --seed 1"

step 'Is the chain really the unsplit model? Compared with transformers, bit for bit:' \
    "llamarun check $out/shards --against $model --device-map cpu"

printf '\nDone. Everything lies in %s/. Your own model next: llamaplan solve --help\n' "$out"
