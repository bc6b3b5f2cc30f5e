# Sourced by the other scripts. Creates and activates .venv, installs requirements.txt into it, and defines
# `install FILE [PIP OPTION ...]`, which installs a requirements file unless this version of it is installed already.
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
