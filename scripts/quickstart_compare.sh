#!/usr/bin/env bash
# Every method of compare_all.sh in the quickstart's small world, on a CPU: `bash scripts/quickstart_compare.sh`.
#
# Continues from quickstart.sh, which it runs first: what that has finished is not done again. Then tunes a math expert
# and a language expert from the same tiny LLM, merges them, and evaluates all rows on the same unseen problems. The
# table is comparison/table.md, .csv and .png in the world's folder. Run again, it continues where it stopped.
#
# The world is there to show the commands at work: its models are a million parameters small and its problems follow
# templates, so its numbers say nothing of the methods. MindMerger's mappings are the quickstart's, trained with the
# LLM that both experts were tuned from; the other rows' LLM is the math expert.
#
# Arguments go to run_evaluation.py.
# Environment: QUICKSTART_COMPARE_LIMIT (problems per language, default: 100), and as in quickstart.sh QUICKSTART_DIR,
#              QUICKSTART_SEED, PYTHON.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${QUICKSTART_DIR:-$root/quickstart}
[[ $folder == /* ]] || folder=$PWD/$folder
export QUICKSTART_DIR=$folder
seed=${QUICKSTART_SEED:-0}
cd "$root"
if [[ $folder == "$root"/* ]]; then folder=${folder#"$root"/}; fi # shorter lines on the screen
if [[ $folder == *[[:space:]]* ]]; then
    printf 'error: QUICKSTART_DIR is "%s": name a folder without blanks, compare_all.sh parts models by them\n' \
        "$folder" >&2
    exit 2
fi

bash scripts/quickstart.sh
SECONDS=0 # what follows is the comparison's own time
# shellcheck source=scripts/setup_venv.sh
source scripts/setup_venv.sh

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Models this small only wait for more threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(min(4, os.cpu_count() or 1))')}

if [[ -d $folder/math_expert && -d $folder/language_expert ]]; then
    printf '\n=== Experts: finished before\n'
else
    printf '\n=== Experts\n'
    # Only one of the two is there when something stopped an earlier attempt between them.
    python -m scripts.tiny_world --output_dir "$folder" --seed "$seed" --experts --overwrite
    printf '=== Experts: %d s\n' "$SECONDS"
fi

# The world's encoder has a decoder too and translates into English, all of its languages but French, without tags.
# The order of parallel_input.py as far as this world has the languages: es, ru, fr, zh, de, then English and Swahili.
LLM_PATH=$folder/math_expert BASE_PATH=$folder/llm LANGUAGE_EXPERT=$folder/language_expert ENGLISH_EXPERT="" \
    MT_PATH=$folder/mt5 MINDMERGER_LLM=$folder/llm HARD_CHECKPOINT=$folder/outputs/quickstart-hard/math/augmentation \
    SOFT_CHECKPOINT=$folder/outputs/quickstart/math/augmentation \
    TASK=math_mgsm TRANSLATIONS=aligned PARALLEL_LANGUAGES=es,ru,fr,zh,de,en,sw PROBE_PREFIX=shuffled \
    TRANSLATOR=$folder/mt5 TRANSLATOR_ARGS="--untagged --max_seq_len 200 --max_new_tokens 200" \
    DATA_ROOT=$folder/datas LANGUAGES=English,Swahili,German,Spanish,Russian,Chinese \
    LIMIT=${QUICKSTART_COMPARE_LIMIT:-100} EVAL_BATCH_SIZE=50 MAX_NEW_TOKENS=40 PRECISION=fp32 \
    RESULTS_DIR=$folder/comparison bash scripts/compare_all.sh "$@"
printf '=== Comparison: %d s\n' "$SECONDS"
