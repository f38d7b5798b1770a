# Source me: `source scripts/setup_venv.sh`. Makes .venv in the project's root if there is none, installs
# requirements.txt when it has changed since the last time, with WITH_TESTS=1 also tests/requirements.txt, and leaves the
# environment activated.
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

# _setup_venv_install FILE STAMP: installs a file's packages, of `root` into `venv`, unless STAMP has its checksum.
_setup_venv_install() {
    local checksum
    checksum=$("$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$1") || return 1
    if [[ -f $2 && $(<"$2") == "$checksum" ]]; then return 0; fi
    echo "installing ${1#"$root/"} into $venv" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$1" || {
        echo "error: pip could not install $1: its last lines above say why" >&2
        return 1
    }
    rm -f "$venv/tests.sha256" # this file may have replaced what the tests' one installed
    printf '%s\n' "$checksum" >"$2"
}

_setup_venv() {
    local root=$1 python
    local venv=$root/.venv requirements=${REQUIREMENTS:-$root/requirements.txt}
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
    _setup_venv_install "$requirements" "$venv/requirements.sha256" || return 1
    # Another file of packages has those of the tests too.
    if [[ -n ${WITH_TESTS-} && -z ${REQUIREMENTS-} ]]; then
        _setup_venv_install "$root/tests/requirements.txt" "$venv/tests.sha256" || return 1
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}

_setup_venv "$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
