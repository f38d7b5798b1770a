#!/usr/bin/env bash
# Fills the data folder: `bash scripts/prepare_data.sh [--archive FILE] [--data_root datas] [--tasks mgsm,x-csqa,xnli]`.
# With --archive it arranges the released data, otherwise it fetches what the hub has. All options: --help.
set -euo pipefail
# A relative path in an argument is the caller's: back to where the caller is.
called_from=$PWD
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_environment python
root=$PWD
cd "$called_from"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m scripts.prepare_data "$@"
