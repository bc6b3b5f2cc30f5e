#!/usr/bin/env bash
# Measure a model: write loss.json, samples.jsonl (128 bulletins) and quality.json into its folder.
#     bash runs/measure.sh results/3M [CORPUS_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
model=$1 corpus=${2:-training_data}
for held_out in "$corpus"/validation.txt "$corpus"/validation.txt.xz; do
    [ -e "$held_out" ] && break
done
python evaluate.py loss --model "$model" --data "$held_out" --json > "$model/loss.json"
python sample.py --model "$model" -n 128 --seed 0 --json > "$model/samples.jsonl"
python evaluate.py quality --samples "$model/samples.jsonl" --data "$corpus" --json > "$model/quality.json"
