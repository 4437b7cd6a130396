#!/bin/sh
# The experiment of docs/experiment.md: a cold start on rationales that often contradict their label, then reward fine-tuning
# by three recipes and two seeds each; every model measured by two judges. A run that was cut off goes on where it was when
# this is called again; what is measured already is kept.
#
#   scripts/experiment.sh FACES.safetensors RUNS_FOLDER
set -eu
if [ $# -ne 2 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
faces=$(realpath "$1")
mkdir -p "$2"
runs=$(realpath "$2")
cd "$(dirname "$0")/.."

cargo build --release --locked -p candor-tools
tools=target/release/candor-tools
media=$(dirname "$faces")
verifier=models/default-verifier

# Where rationales err, they err as a hasty annotator does. The tower is that of the default model.
[ -e "$runs/data/data.json" ] || "$tools" data faces --faces "$faces" --out "$runs/data"
"$tools" train sft --faces "$faces" --data "$runs/data" --tower models/default --part noisy --out "$runs/cold" \
    --features "$runs/tower-features" --name candor-noisy
start=$runs/cold/model
for part in train val; do
    "$tools" data features --model "$start" --data "$runs/data/prompts-$part.jsonl" --media-root "$media" \
        --cache "$runs/features"
done

# measure NAME ADAPTER POLICY: validation photographs, greedy, as they would be in use.
measure() {
    [ -e "$runs/eval/$1.json" ] && return
    mkdir -p "$runs/eval"
    "$tools" eval --model "$start" ${2:+--adapter "$2"} --verifier "$verifier" --data "$runs/data/prompts-val.jsonl" \
        --media-root "$media" --features "$runs/features" --policy "$3" --records "$runs/eval/$1.jsonl" \
        --html "$runs/eval/$1.html" --json \
        >"$runs/eval/$1.json.part"
    mv "$runs/eval/$1.json.part" "$runs/eval/$1.json"
}

# train NAME SEED OPTIONS…
train() {
    name=$1-$2
    recipe_seed=$2
    shift 2
    "$tools" train grpo --model "$start" --verifier "$verifier" --data "$runs/data/prompts-train.jsonl" \
        --media-root "$media" --features "$runs/features" --out "$runs/$name" --seed "$recipe_seed" \
        --passes 1 --prompts 16 --drop-flat --rate 2e-4 --schedule cosine --warm-up 20 --threads 1 "$@" \
        >"$runs/$name.log" 2>&1 || { tail -n 3 "$runs/$name.log" >&2; return 1; }
}

measure before "" annotate
# Both seeds at a time, a thread each.
both() {
    recipe=$1
    shift
    train "$recipe" 1 "$@" &
    first=$!
    train "$recipe" 2 "$@" || { wait "$first"; exit 1; }
    wait "$first" || exit 1
    for seed in 1 2; do
        measure "$recipe-$seed" "$runs/$recipe-$seed" annotate
    done
}
both explanation
both guarded --guard --groundedness-weight 0.5
both accuracy --explanation-weight 0
# What the guarded recipe learnt, at less than its full strength: LoRA's scale is alpha by rank.
weaken() {
    for seed in 1 2; do
        mkdir -p "$runs/$1-$seed"
        cp "$runs/guarded-$seed/adapter_model.safetensors" "$runs/$1-$seed/"
        sed "s/\"lora_alpha\": [0-9.]*/\"lora_alpha\": $2/" "$runs/guarded-$seed/adapter_config.json" \
            >"$runs/$1-$seed/adapter_config.json"
        measure "$1-$seed" "$runs/$1-$seed" annotate
    done
}
weaken tempered 24.0
weaken halved 16.0
# What the policies of run time reach without training, and with it.
for policy in retry:2 guide:2; do
    measure "before-$policy" "" "$policy"
    for recipe in accuracy explanation guarded tempered; do
        measure "$recipe-1-$policy" "$runs/$recipe-1" "$policy"
    done
done

scripts/experiment.py "$runs"
