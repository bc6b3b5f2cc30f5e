#!/usr/bin/env bash
# Measure a model folder: loss.json, samples.jsonl (128 bulletins), quality.json are written into it.
#     bash runs/measure.sh results/3M
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
python evaluate.py loss --model "$1" --json > "$1/loss.json"
python sample.py --model "$1" -n 128 --seed 0 --json > "$1/samples.jsonl"
python evaluate.py quality --samples "$1/samples.jsonl" --json > "$1/quality.json"
