#!/usr/bin/env bash
# Train and evaluate all four sizes, with the published and the fast recipe, on this machine; meant for one GPU.
# Finished models are not trained and measured again; unfinished runs are resumed.
#     bash runs/reproduce.sh [CORPUS_FOLDER]
set -euo pipefail
corpus=$(realpath "${1:-$(dirname "$0")/../training_data}")
cd "$(dirname "$0")/.."
source runs/environment.sh
for name in 3M 11M 28M 59M 3M-fast 11M-fast 28M-fast 59M-fast; do
    python train.py --config "configs/$name.json" --data "$corpus" --out "models/reproduced/$name" --resume
    [ -s "models/reproduced/$name/quality.json" ] ||       # empty where measuring was cut short
        bash runs/measure.sh "models/reproduced/$name" "$corpus"
done
