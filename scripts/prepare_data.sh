#!/usr/bin/env bash
# Fills the data folder: `bash scripts/prepare_data.sh [--archive FILE] [--data_root datas] [--tasks mgsm,x-csqa,xnli]`.
# With --archive it arranges the released data, otherwise it fetches what the hub has. All options: --help.
set -euo pipefail
# A relative path in an argument is the caller's: stay where the caller is.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z ${VIRTUAL_ENV-} && -f "$root/.venv/bin/activate" ]]; then
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m scripts.prepare_data "$@"
