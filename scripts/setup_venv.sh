# Source me: `source scripts/setup_venv.sh`. Makes .venv in the project's root if there is none, installs
# requirements.txt when it has changed since the last time, and leaves the environment activated.
#
# PYTHON names the interpreter to make it with (3.11 or newer), REQUIREMENTS another file of packages, for instance of
# older versions; pip reads its own variables (PIP_INDEX_URL, …).
# Where something is missing it prints one line and returns 1.

_setup_venv_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_setup_venv_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if _setup_venv_is_new_enough "$candidate"; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    if [[ -n ${PYTHON:-} ]]; then
        echo "error: PYTHON=$PYTHON does not run as Python 3.11 or newer: name another interpreter" >&2
    else
        echo "error: Python 3.11 or newer is needed and none is on PATH: install it, or name it with PYTHON=/path/to/python3.11" >&2
    fi
    return 1
}

_setup_venv() {
    local root=$1 python checksum
    local venv=$root/.venv requirements=${REQUIREMENTS:-$root/requirements.txt}
    local stamp=$venv/requirements.sha256
    if [[ ! -x $venv/bin/python || ! -f $venv/bin/activate ]]; then
        python=$(_setup_venv_find_python) || return 1
        echo "making $venv with $python" >&2
        "$python" -m venv "$venv" || {
            echo "error: $python cannot make $venv: install its venv module (on Debian and Ubuntu: python3-venv)" >&2
            return 1
        }
    elif ! _setup_venv_is_new_enough "$venv/bin/python"; then
        echo "error: $venv holds a Python older than 3.11, or a broken one: remove the folder and start again" >&2
        return 1
    fi
    checksum=$("$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$requirements") || return 1
    if [[ ! -f $stamp || $(<"$stamp") != "$checksum" ]]; then
        echo "installing ${requirements#"$root/"} into $venv" >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" || {
            echo "error: pip could not install $requirements: its last lines above say why" >&2
            return 1
        }
        printf '%s\n' "$checksum" >"$stamp"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

_setup_venv "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
