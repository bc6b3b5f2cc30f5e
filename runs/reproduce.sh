#!/usr/bin/env bash
# Train and evaluate all four sizes, published and fast recipe, on the machine at hand; meant for one GPU. Folders that are
# finished are passed over, unfinished runs go on. Arguments go to train.py, such as --data DIR_OR_HUB_ID.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
for config in 3M 11M 28M 59M 3M-fast 11M-fast 28M-fast 59M-fast; do
    out=models/reproduced/$config
    if [ ! -e "$out/model.safetensors" ]; then
        python train.py --config "configs/$config.json" --out "$out" --resume "$@"
    fi
    bash runs/measure.sh "$out"
done
