#!/usr/bin/env bash
# The whole method on real pretrained models that two CPU cores can train: tuning an English LLM on NLI, both stages,
# Soft and Hard, their controls, one table.
#
#   bash scripts/small_real_models.sh                 # FAST=1: reduced, to see it run; LONG=1: more steps and rows
#   LLM_PATH=folder MT_PATH=folder DATA_ROOT=datas TUNING_ROWS=snli.json bash scripts/small_real_models.sh
#
# The LLM is tuned on English rows alone, as the published ones were, and the mappings on other premises of XNLI's dev
# set. Every number of the table is on XNLI's test rows, which nothing was chosen on. What is finished is kept: the same
# command continues, also after a kill; with a larger LIMIT the finished evaluations are extended. With other settings
# or data a step is made anew, and all that is made from it.
#
# Environment:
#   LLM_PATH (HuggingFaceTB/SmolLM2-135M-Instruct), MT_PATH (intfloat/multilingual-e5-small)
#   DATA_ROOT (datas)      with XNLI (scripts/prepare_data.sh fetches it) and, better, bilingual_pairs
#   TUNING_ROWS            a file of further English rows for the LLM, in the form of query_translation/xnli_dev.json
#   SMALL_MODELS_DIR (small_models, with FAST=1 small_models_fast, with LONG=1 small_models_long)   all that is written
#   LANGUAGES (sw,tr,de,zh,ru,ar,hi)  beside English
#   ENCODER_LAYER (10)     hidden layer of the encoder that the mapping reads, or last
#   TUNING_STEPS, MAPPING_STEPS, HARD_STEPS, SOFT_STEPS, LIMIT (test rows per language)   defaults below
#   CONTROLS=1             also a random encoder in the same recipe, a classifier on the encoder without any LLM, and
#                          the LLM with a LoRA tuned on the same rows
#   BRIDGES                also compares these (compare_bridges.sh), on the same models and data, each from a fresh start
#                          with TARGET_TOKENS (defaults below), SEEDS ($SEED) and LRS (1e-3)
#   SEED (0), PRECISION (auto)
set -euo pipefail
called_from=$PWD
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_environment python

llm=${LLM_PATH:-HuggingFaceTB/SmolLM2-135M-Instruct} encoder=${MT_PATH:-intfloat/multilingual-e5-small}
data_root=${DATA_ROOT:-datas} seed=${SEED:-0} languages=${LANGUAGES:-sw,tr,de,zh,ru,ar,hi} precision=${PRECISION:-auto}

tuning_steps=120 mapping_steps=100 hard_steps=120 soft_steps=60 limit=150 tokens=20000
kind=""
if is_on FAST "${FAST-}"; then
    tuning_steps=40 mapping_steps=20 hard_steps=20 soft_steps=10 limit=20 tokens=2000
    kind=_fast
fi
if is_on LONG "${LONG-}"; then
    tuning_steps=600 mapping_steps=1000 hard_steps=600 soft_steps=400 limit=1980 tokens=200000
    kind=_long
fi
work=${SMALL_MODELS_DIR:-small_models$kind}
if [[ -n ${SMALL_MODELS_DIR-} && $work != /* ]]; then work=$called_from/$work; fi
tuning_steps=${TUNING_STEPS:-$tuning_steps} mapping_steps=${MAPPING_STEPS:-$mapping_steps}
hard_steps=${HARD_STEPS:-$hard_steps} soft_steps=${SOFT_STEPS:-$soft_steps} limit=${LIMIT:-$limit}
dev_size=${DEV_SIZE:-300} layer=(--bridge_option "encoder_layer=${ENCODER_LAYER:-10}")

export TOKENIZERS_PARALLELISM=false
export HF_DATASETS_CACHE=${HF_DATASETS_CACHE:-$work/cache}

# step SLUG KIND MADE AFTER TITLE COMMAND...: announces and times a command; one that has finished as it stands is not run
# again, unless a step of AFTER, the slugs of those that it reads from, has been since. MADE is the folder that it leaves
# and KIND when that is removed first: always, where no program adds to it (anew); where its command has changed or a
# step of AFTER was made since it began (resumes); in the latter case alone (extends).
step() {
    local slug=$1 kind=$2 made=$3 after=$4 title=$5 started=$SECONDS name stale="" old=""
    local stamp=$work/finished/$1 begun=$work/begun/$1
    shift 5
    if [[ -f $begun ]]; then old=$begun; elif [[ -f $stamp ]]; then old=$stamp; fi
    for name in $after; do
        if [[ -n $old && $work/finished/$name -nt $old ]]; then stale=yes; fi
    done
    if [[ -z $stale && -f $stamp && $(<"$stamp") == "$*" ]]; then
        printf '=== %s: finished before\n' "$title"
        return
    fi
    if [[ $kind == resumes && -n $old && $(<"$old") != "$*" ]]; then stale=yes; fi
    rm -f "$stamp"
    if [[ $kind == anew || -n $stale ]]; then rm -rf "$made"; fi
    mkdir -p "${begun%/*}" "${stamp%/*}"
    printf '%s' "$*" >"$begun"
    printf '\n=== %s%s\n    %s\n' "$title" "${stale:+, anew, since its settings or what it is made from have changed}" "$*"
    "$@"
    printf '%s' "$*" >"$stamp"
    printf '=== %s: %d s (%d s in all)\n' "$title" $((SECONDS - started)) "$SECONDS"
}

# shown FILE COMMAND...: keeps what a command prints in a file too.
shown() {
    local file=$1
    shift
    mkdir -p "${file%/*}"
    "$@" | tee "$file.part"
    mv "$file.part" "$file"
}

# train_stage STAGE NAME STEPS LLM AFTER ARGUMENT...
train_stage() {
    local stage=$1 name=$2 steps=$3 model=$4 after=$5 folder=$1
    shift 5
    if [[ $stage == adapter ]]; then folder=llm_adapter; fi
    step "$name-$stage" resumes "$work/outputs/$name/xnli/$folder" "data $after" "$name: $stage" python run_training.py \
        --llm_path "$model" --data_root "$work/datas" \
        --task xnli --stage_name "$stage" --save_name "$name" --output_dir "$work/outputs" --max_steps "$steps" \
        --epoch_num 100 --train_batch_size 32 --train_micro_batch_size_per_gpu 32 --micro_batch_tokens 2048 \
        --eval_batch_size 32 --dev_size "$dev_size" --lr_scheduler cosine --warmup_ratio 0.05 --max_seq_len 200 \
        --max_gen_len 400 --eval_steps 50 --precision "$precision" --seed "$seed" --num_workers 1 "$@"
}

# train_all NAME ENCODER: a start by regression, mapping, Hard, and Soft from Hard, in starts/NAME,
# outputs/NAME/xnli/mapping, outputs/NAME-hard/xnli/augmentation and outputs/NAME/xnli/augmentation.
# The first two are for the LLM as it was before: one that was tuned on labels alone writes no sentences any more, and a
# mapping that is trained through it learns next to nothing of its source. Their input embeddings are nearly the same.
train_all() {
    local read_from=""
    if [[ $1 == random ]]; then read_from=random-encoder; fi
    step "$1-start" anew "$work/starts/$1" "data $read_from" "$1: start" python -m scripts.start_mapping \
        --llm_path "$llm" --mt_path "$2" --data_root "$work/datas" --languages "$languages" --precision "$precision" \
        --seed "$seed" --output_dir "$work/starts/$1" "${layer[@]}"
    train_stage mapping "$1" "$mapping_steps" "$llm" "$1-start" --mt_path "$2" "${layer[@]}" --languages "$languages" \
        --lr 1e-3 --init_checkpoint "$work/starts/$1"
    train_stage augmentation "$1-hard" "$hard_steps" "$work/llm" "tuning $1-mapping" --mt_path "$2" "${layer[@]}" \
        --augmentation False --lr 1e-3 --init_checkpoint "$work/outputs/$1/xnli/mapping"
    train_stage augmentation "$1" "$soft_steps" "$work/llm" "tuning $1-hard-augmentation" --mt_path "$2" "${layer[@]}" \
        --lr 5e-4 --init_checkpoint "$work/outputs/$1-hard/xnli/augmentation"
}

# evaluate LABEL SLUG FORM AFTER ARGUMENT...: FORM is what the results folder's name ends in.
table=()
evaluate() {
    local label=$1 slug=$2 form=$3 after=$4 made=$work/results/$2/xnli$3-likelihood
    shift 4
    step "evaluation-$slug$form" extends "$made" "data tuning $after" "$label: evaluation" python run_evaluation.py \
        --llm_path "$work/llm" --data_root "$work/datas" \
        --task xnli --languages "en,$languages" --limit "$limit" --scoring likelihood --results_dir "$work/results" \
        --save_name "$slug" --eval_max_tokens 8192 --precision "$precision" --seed "$seed" "$@"
    table+=(--row "$label=$made")
}

mkdir -p "$work"
step data anew "$work/datas" "" "Data" python -m scripts.small_models data --data_root "$data_root" \
    --output_dir "$work/datas" --languages "$languages" --seed "$seed"
rows=(--rows "$work/datas/tuning.json")
if [[ -n ${TUNING_ROWS-} ]]; then rows+=(--rows "$TUNING_ROWS"); fi
step tuning resumes "$work/llm" data "Tuning of the LLM on English rows" python -m scripts.tune_llm --llm_path "$llm" --task xnli \
    --data_root "$work/datas" --rows_only "${rows[@]}" --train_num 1500 --output_dir "$work/llm" \
    --max_steps "$tuning_steps" --epoch_num 100 --dev_size "$dev_size" --precision "$precision" --seed "$seed"
train_all real "$encoder"
if is_on CONTROLS "${CONTROLS-}"; then
    step random-encoder anew "$work/random_encoder" "" "Random encoder" python -m scripts.small_models \
        random_encoder --mt_path "$encoder" --output_dir "$work/random_encoder" --seed "$seed"
    train_all random "$work/random_encoder"
    step encoder-alone anew "$work/results/encoder_alone.txt" data "A classifier on the encoder alone" \
        shown "$work/results/encoder_alone.txt" python \
        -m scripts.small_models encoder_alone --mt_path "$encoder" --data_root "$work/datas" \
        --languages "en,$languages" --limit "$limit" --seed "$seed"
    train_stage adapter lora "$((hard_steps + soft_steps))" "$work/llm" tuning --llm_only --adapter lora --lr 1e-3
fi

evaluate "LLM alone" llm -llm_only "" --llm_only
soft=(--mt_path "$encoder" --init_checkpoint "$work/outputs/real/xnli/augmentation" --augmentation True)
evaluate "MindMerger-Soft" real "" real-augmentation "${soft[@]}"
# Of other rows every row's partner is another: such an evaluation is never extended.
evaluate "MindMerger-Soft, shuffled prefix" "real-$limit" -prefix_shuffled real-augmentation "${soft[@]}" \
    --probe_prefix shuffled
evaluate "MindMerger-Hard" real -hard real-hard-augmentation --mt_path "$encoder" --augmentation False \
    --init_checkpoint "$work/outputs/real-hard/xnli/augmentation"
if is_on CONTROLS "${CONTROLS-}"; then
    evaluate "MindMerger-Soft, random encoder" random "" random-augmentation --mt_path "$work/random_encoder" \
        --augmentation True --init_checkpoint "$work/outputs/random/xnli/augmentation"
    evaluate "LLM with LoRA, same rows" lora -llm_only-adapter lora-adapter --llm_only \
        --adapter_path "$work/outputs/lora/xnli/llm_adapter/adapter"
fi

printf '\n=== Table\n'
python -m mindmerger.evaluation.comparison_table "${table[@]}" --against "LLM alone" --output_dir "$work/results"
python -m mindmerger.evaluation.comparison_table "${table[@]}" --output_dir "$work/results/against_shuffled" \
    --against "MindMerger-Soft, shuffled prefix" >"$work/results/against_shuffled.log"
printf '=== tested against the prefix of another question: %s\n' "$work/results/against_shuffled/table.md"
printf '\n=== Without English, by premises\n'
python -m scripts.small_models summary --data_root "$work/datas" "${table[@]}" --against "LLM alone" \
    --against "MindMerger-Soft, shuffled prefix" --output "$work/results/summary.md" --seed "$seed"
if [[ -n ${BRIDGES-} ]]; then
    # Its trainings and evaluations know models by their paths alone.
    for slug in data tuning; do
        if [[ -d $work/bridges && $work/finished/$slug -nt $work/bridges/plan.tsv ]]; then
            rm -rf "$work/bridges" "$work/outputs/bridges-"*
        fi
    done
    # LANGUAGES would leave English out of the task's rows, and trainings of another SAVE_NAME would outlive their data.
    unset=()
    for name in languages save_name config "${not_compared[@]%%=*}"; do
        unset+=(-u "$name" -u "$(printf '%s' "$name" | tr '[:lower:]' '[:upper:]')")
    done
    # A fresh mapping for each, the same target tokens for all, and the pairs through the LLM as it was here too.
    env "${unset[@]}" LLM_PATH="$work/llm" PAIRS_LLM_PATH="$llm" MT_PATH="$encoder" \
        DATA_ROOT="$work/datas" TASK=xnli BRIDGES="$BRIDGES" RESULTS_DIR="$work/bridges" OUTPUT_DIR="$work/outputs" \
        SEEDS="${SEEDS:-$seed}" LRS="${LRS:-1e-3}" PAIRS_SHARE=0.8 TARGET_TOKENS="${TARGET_TOKENS:-$tokens}" \
        TRAIN_BATCH_SIZE=32 MICRO_BATCH_TOKENS=2048 EVAL_BATCH_SIZE=32 DEV_SIZE="$dev_size" PRECISION="$precision" \
        LR_SCHEDULER=cosine WARMUP_RATIO=0.05 MAX_SEQ_LEN=200 MAX_GEN_LEN=400 NUM_WORKERS=1 SCORING=likelihood \
        EVAL_MAX_TOKENS=8192 LIMIT="$limit" PAIRS_LANGUAGES="$languages" EVALUATION_LANGUAGES="en,$languages" \
        bash scripts/compare_bridges.sh
fi
printf '=== All steps: %d s\n' "$SECONDS"
