# Sourced by the other scripts: a virtual environment in .venv with requirements.txt installed.
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
source .venv/bin/activate
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo "installing requirements.txt into .venv ..." >&2
    pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
