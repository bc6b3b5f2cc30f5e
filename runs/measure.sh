#!/usr/bin/env bash
# Measure a model: write loss.json, samples.jsonl (128 bulletins) and quality.json into its folder.
#     bash runs/measure.sh results/3M [CORPUS_FOLDER]
set -euo pipefail
model=$(realpath "$1") corpus=$(realpath "${2:-$(dirname "$0")/../training_data}")
cd "$(dirname "$0")/.."
source runs/environment.sh
for held_out in "$corpus"/validation.txt "$corpus"/validation.txt.xz; do
    [ -e "$held_out" ] && break
done
python evaluate.py loss --model "$model" --data "$held_out" --json > "$model/loss.json"
python sample.py --model "$model" -n 128 --seed 0 --json > "$model/samples.jsonl"
python evaluate.py quality --samples "$model/samples.jsonl" --data "$corpus" --json > "$model/quality.json"
