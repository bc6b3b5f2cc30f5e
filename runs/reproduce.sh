#!/usr/bin/env bash
# Train and evaluate all four sizes, by the published and the fast recipe, on the machine at hand; meant for one GPU.
# Finished models are passed over, unfinished runs go on.
#     bash runs/reproduce.sh [CORPUS_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
corpus=${1:-training_data}
for name in 3M 11M 28M 59M 3M-fast 11M-fast 28M-fast 59M-fast; do
    python train.py --config "configs/$name.json" --data "$corpus" --out "models/reproduced/$name" --resume
    bash runs/measure.sh "models/reproduced/$name" "$corpus"
done
