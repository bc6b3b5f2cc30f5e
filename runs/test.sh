#!/usr/bin/env bash
# Run the tests on a fresh machine: create a virtual environment, install, run pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
install requirements-teacher.txt --no-deps      # the tests of export and of the teacher need transformers
python -m pytest -q -n 2 --dist loadfile "$@"      # two processes, each a file of tests at a time
