#!/bin/sh
# A real chat model, from the GGUF file people have to answers in 16, 8 and 4 bits. Run by `make demo-real`.
set -eu
file=$1
out=$2
mkdir -p "$out"

step() {
    printf '\n==> %s\n    $ %s\n\n' "$1" "$2"
    sh -c "$2"
}

# The weights themselves are compared bit for bit, rounded ones on a text.
text_for() {
    case $1 in int*) printf -- '--text docs/running.md ' ;; esac
}

step 'What does the file hold? Sizes come from its header, to the byte.' \
    "llamaplan analyze $file --ctx-size 2048"

step 'Its weights are Q4_1, which no checkpoint holds without loss: everything in bf16 is an ordinary checkpoint.' \
    "llamaplan solve $file --device cpu=4GiB --ctx-size 2048 -o $out/file.json &&
      llamaplan export $out/file.json --model $file --requantise bf16 -o $out/original --force"

for weights in bf16 int8 int4; do
    step "Plan and write it with weights of $weights." \
        "llamaplan solve $out/original --weights $weights --device cpu=4GiB --ctx-size 2048 -o $out/$weights.json &&
      llamaplan export $out/$weights.json --model $out/original -o $out/$weights --force"

    step 'Talk with it.' \
        "echo 'What is the capital of France?' | llamarun chat $out/$weights --temp 0 -n 40"

    step 'How fast is it here?' \
        "llamarun bench $out/$weights --json > $out/$weights.bench.json"

    step 'How far is it from the unquantised model?' \
        "llamarun check $out/$weights --against $out/original $(text_for $weights)--json > $out/$weights.check.json"
done

printf '\n==> What the bits cost and bring:\n\n'
python docs/demo_real_table.py "$out"
printf '\nDone. Everything lies in %s/. Your own file next: llamaplan solve my-model.gguf --help\n' "$out"
