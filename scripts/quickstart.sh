#!/usr/bin/env bash
# MindMerger from nothing on a CPU, in one command: `bash scripts/quickstart.sh`.
#
# Makes a small world (word problems in six languages, a tiny LLM that knows only English, a tiny encoder), trains both
# stages and compares the LLM alone with MindMerger-Hard and MindMerger-Soft on unseen problems, and with a control:
# Soft with the prefix of another question before each prompt. No downloads after the packages. Run again, it continues
# where it stopped; to start over, remove the folder.
#
# Environment: QUICKSTART_DIR (default: quickstart in the project's root), QUICKSTART_SEED (default: 0),
#              QUICKSTART_WORLD_ARGS (more arguments of scripts.tiny_world), PYTHON (see setup_venv.sh).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${QUICKSTART_DIR:-$root/quickstart}
[[ $folder == /* ]] || folder=$PWD/$folder
seed=${QUICKSTART_SEED:-0}
cd "$root"
if [[ $folder == "$root"/* ]]; then folder=${folder#"$root"/}; fi # shorter lines on the screen

# step TITLE COMMAND...: announces and times a command; one that has succeeded before is not run again.
step() {
    local title=$1 started=$SECONDS
    local stamp=$folder/.finished/${title//[^A-Za-z0-9]/-}
    shift
    if [[ -f $stamp ]]; then
        printf '\n=== %s: finished before\n' "$title"
        return
    fi
    printf '\n=== %s\n' "$title"
    printf '    %s\n' "$*"
    "$@"
    mkdir -p "${stamp%/*}"
    : >"$stamp"
    printf '=== %s: %d s (%d s in all)\n' "$title" $((SECONDS - started)) "$SECONDS"
}

printf '=== Packages\n'
# shellcheck source=scripts/setup_venv.sh
source scripts/setup_venv.sh
printf '=== Packages: %d s\n' "$SECONDS"
SECONDS=0 # what follows is the quickstart's own time

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Models this small only wait for more threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(min(4, os.cpu_count() or 1))')}
export HF_DATASETS_CACHE=$PWD/$folder/cache
[[ $folder != /* ]] || export HF_DATASETS_CACHE=$folder/cache

models=(--llm_path "$folder/llm" --mt_path "$folder/mt5" --data_root "$folder/datas" --precision fp32)
training=(deepspeed --num_gpus 1 --log_level critical run_training.py --deepspeed "${models[@]}" --output_dir "$folder/outputs" --task math
    --train_batch_size 64 --train_micro_batch_size_per_gpu 32 --eval_batch_size 64 --dev_size 256 --max_seq_len 200
    --max_gen_len 400 --epoch_num 1 --lr_scheduler cosine --warmup_ratio 0.05 --num_workers 0 --seed "$seed")
evaluation=(python run_evaluation.py "${models[@]}" --results_dir "$folder/results" --save_name quickstart --task math
    --languages English,Swahili,German,Spanish,Russian,Chinese --eval_batch_size 50 --max_new_tokens 40)
mapping=$folder/outputs/quickstart/math/mapping

# The extra arguments are words on purpose.
# shellcheck disable=SC2086
step "Small world" python -m scripts.tiny_world --output_dir "$folder" --seed "$seed" ${QUICKSTART_WORLD_ARGS:-}
step "Stage 1, mapping" "${training[@]}" --save_name quickstart --stage_name mapping \
    --languages Swahili,German,Spanish,Russian,Chinese --lr 2e-3
step "Stage 2, augmentation, Soft" "${training[@]}" --save_name quickstart --stage_name augmentation --lr 1e-3
step "Stage 2, augmentation, Hard" "${training[@]}" --save_name quickstart-hard --stage_name augmentation \
    --augmentation False --init_checkpoint "$mapping" --lr 1e-3
step "Evaluation of the LLM alone" "${evaluation[@]}" --llm_only
step "Evaluation of MindMerger-Hard" "${evaluation[@]}" --augmentation False \
    --init_checkpoint "$folder/outputs/quickstart-hard/math/augmentation"
step "Evaluation of MindMerger-Soft" "${evaluation[@]}" --augmentation True \
    --init_checkpoint "$folder/outputs/quickstart/math/augmentation"
step "Evaluation of MindMerger-Soft, shuffled prefix" "${evaluation[@]}" --augmentation True \
    --init_checkpoint "$folder/outputs/quickstart/math/augmentation" --probe_prefix shuffled

printf '\n=== The LLM alone, MindMerger-Hard and MindMerger-Soft on the same unseen problems\n'
results=$folder/results/quickstart/math_mgsm
python -m mindmerger.evaluation.comparison_table --output_dir "$folder/results" --row "LLM alone=$results-llm_only" \
    --row "MindMerger-Hard=$results-hard" --row "MindMerger-Soft=$results" \
    --row "MindMerger-Soft, shuffled prefix=$results-prefix_shuffled"
printf '=== All steps: %d s\n' "$SECONDS"
