#!/usr/bin/env bash
# Runs the test suite: `bash scripts/test.sh [pytest arguments]`, for instance `-m "not slow"` or `tests/test_scripts.py`.
# Soak tests never run from here. PYTEST_WORKERS says how many tests run at once (default: 3). Ends with pytest's exit code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

expression="not soak"
arguments=()
while [[ $# -gt 0 ]]; do
    # pytest obeys only the last -m, so a caller's own is joined to ours.
    case $1 in
        -m)
            expression="($2) and not soak"
            shift
            ;;
        -m*) expression="(${1#-m}) and not soak" ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

# shellcheck source=scripts/setup_venv.sh
WITH_TESTS=1 source scripts/setup_venv.sh

# The models are tiny and some tests start several processes: more threads than one only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
# No test needs a network, and none may wait for one.
export HF_HUB_OFFLINE=1

# Three workers on two cores, since many tests wait for processes; PYTEST_WORKERS=0 runs all in one, for a debugger.
exec python -m pytest -n "${PYTEST_WORKERS:-3}" -m "$expression" ${arguments[@]+"${arguments[@]}"}
