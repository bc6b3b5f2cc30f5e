#!/usr/bin/env bash
# From a fresh clone to a language model that writes news: create a virtual environment, install, train for a few minutes
# on the bundled corpus, write five bulletins. Needs no key, no account and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
out=models/quickstart
if [ ! -e "$out/model.safetensors" ]; then
    python train.py --config configs/3M-fast.json --out "$out" --max-steps 300 --eval-every 75 --resume
fi
echo
echo "Five bulletins of the model that you have just trained ($out):"
echo
python sample.py --model "$out" -n 5 --seed 1
cat <<'END'
What to try next:
  python sample.py --headline "Storm closes schools along the coast"    # the bundled model
  python train.py --config configs/3M-fast.json                         # the whole corpus
  jupyter lab demo.ipynb                                                # look inside a model
END
