# Sourced by the other scripts: a virtual environment in .venv, and `install FILE [PIP OPTION ...]` for what it lacks.
if [ ! -x .venv/bin/python ]; then
    python3 -m venv .venv
fi
source .venv/bin/activate

install() {
    if ! cmp -s "$1" ".venv/$1"; then
        echo "installing $1 into .venv ..." >&2
        pip install --quiet --disable-pip-version-check "${@:2}" -r "$1"
        cp "$1" ".venv/$1"
    fi
}

install requirements.txt
