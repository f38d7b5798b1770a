#!/usr/bin/env bash
# Every bridge on the same models, data, items, number of target tokens and seeds; one table: bridges.md, .csv, .png.
#
#   LLM_PATH=meta-math/MetaMath-7B-V1.0 MT_PATH=google/mt5-xl bash scripts/compare_bridges.sh
#   bash scripts/compare_bridges.sh        # the quickstart's small world, on a CPU
#
# For each bridge of mindmerger.bridges.BRIDGES: its stages in order with each of LRS and the first seed, the learning
# rate with the lowest dev loss of the last stage, its stages with that rate and every seed, and an evaluation of each
# seed, also with the prefix of another question (--probe_prefix shuffled). The same but for the prefix for the control
# of every bridge, an adapter on the LLM alone that is trained on the task's rows. Then the LLM alone, once. Rows: the
# LLM alone, the bridges, the LLM with an adapter, translate-test where a translator is given, ST-Merge (not
# reproduced). What cannot be made is listed as missing with the reason. What is finished is kept: the same command
# continues.
#
# Without LLM_PATH and MT_PATH it makes the quickstart's small world, or takes the one that is there, and runs reduced
# (less than half an hour on two cores): two seeds, TARGET_TOKENS=80000 (about an eighth of the quickstart's two stages),
# SEARCH_TOKENS=12000, 50 problems per language, its batches and lengths, and with two cores JOBS=2. Its models are a
# million parameters small: the numbers show the commands at work, not which bridge is better.
#
# Environment (as in common.sh, capitals or as the flag is written):
#   LLM_PATH, MT_PATH     both models; TASK (math_mgsm), BRIDGES (all; names with blanks between them)
#   <BRIDGE>_OPTIONS      of one bridge, with blanks between them (LANGBRIDGE_OPTIONS="mapper=latent latents=32"); its
#                         row then names them
#   SEEDS (0,1,2)         of the trainings
#   LRS (2e-5 1e-4 6e-4)  the learning rates to choose from, the same for all bridges; LR fixes one for all instead
#   TARGET_TOKENS         of each bridge over all its stages (default: what MindMerger's stages read in EPOCH_NUM passes)
#   SEARCH_TOKENS         of a training that searches a rate (default: as TARGET_TOKENS; the best one then counts)
#   PAIRS_SHARE           of the target tokens, for bridges with stages on sentence pairs and on the task's rows
#   ADAPTER (lora)        of the control, with ADAPTER_RANK and the other flags of the adapter stage; none: no control
#   TRANSLATOR            a model that translates into English: translate-test; TRANSLATOR_ARGS, of its program
#   TRANSLATE_TEST        its translations where they are made already
#   JOBS (1)              trainings and evaluations that run at once, on a CPU alone
#   RESULTS_DIR (results/bridges), OUTPUT_DIR (outputs), SAVE_NAME (bridges)
#   QUICKSTART_DIR, QUICKSTART_SEED, QUICKSTART_WORLD_ARGS     of the small world, as in quickstart.sh
#   any other flag of run_training.py and run_evaluation.py: DATA_ROOT, LANGUAGES, LIMIT, PRECISION, TRAIN_NUM, ...;
#   PAIRS_<FLAG>, TASK_<FLAG>, EVALUATION_<FLAG> for stages on sentence pairs, on the task's rows, and for evaluations;
#   no CONFIG
# With NUM_GPUS, HOSTFILE or DEEPSPEED_ARGS set, everything runs under the deepspeed launcher.
set -euo pipefail
called_from=$PWD
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_environment python

[[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || fail "JOBS is '$JOBS': a whole number of at least 1"

# Given to every stage by this script, so that no variable sets them for all.
owned="bridge bridge_option stage_name lr seed max_steps epoch_num output_dir save_name init_checkpoint augmentation"
owned+=" dry_run overwrite_output_dir resume_from_checkpoint allow_changed llm_only"
given_to_rows="results_dir save_name llm_path mt_path init_checkpoint bridge bridge_option augmentation llm_only"
given_to_rows+=" probe_prefix parallel_input translations parallel_languages order translate_test adapter_path seed"
row_flags=()
for REPLY in $given_to_rows task config; do
    row_flags+=("$REPLY=leave it out, the rows differ in it: see the variables in scripts/compare_bridges.sh")
done
refuse_owned_arguments "$@"
read_flags mindmerger.training.flags deepspeed task local_rank gpu
for flag in "${not_compared[@]}"; do refuse_variable "$flag"; done
refuse_config PAIRS TASK EVALUATION

# usual NAME VALUE: what a flag is in the small world, unless a variable of any of its names says otherwise.
usual() {
    setting "" "$1"
    if [[ -z $REPLY ]]; then printf -v "$(printf '%s' "$1" | tr '[:lower:]' '[:upper:]')" '%s' "$2"; fi
}

small=""
setting "" llm_path
if [[ -z $REPLY ]]; then
    setting "" mt_path
    [[ -z $REPLY ]] || fail "MT_PATH is given and LLM_PATH is not: give both, or neither for the small world"
    small=yes
    world=${QUICKSTART_DIR:-quickstart}
    if [[ -n ${QUICKSTART_DIR-} && $world != /* ]]; then world=$called_from/$world; fi
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    # Models this small gain little from more threads: two processes use two cores better.
    cores=$(python -c 'import os; print(min(4, os.cpu_count() or 1))')
    if [[ -z ${NUM_GPUS-}${HOSTFILE-}${DEEPSPEED_ARGS-} && $cores -gt 1 ]]; then JOBS=${JOBS:-2}; fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ${JOBS:-1} ? cores / ${JOBS:-1} : 1))}
    LLM_PATH=$world/llm MT_PATH=$world/mt5 DATA_ROOT=$world/datas
    usual results_dir "$world/bridges"
    usual output_dir "$world/outputs"
    for REPLY in seeds=0,1 "lrs=3e-4 1e-3 3e-3" target_tokens=80000 search_tokens=12000 precision=fp32 train_batch_size=64 \
        micro_batch_tokens=0 train_micro_batch_size_per_gpu=32 eval_batch_size=64 dev_size=256 num_workers=0 \
        max_seq_len=200 max_gen_len=400 lr_scheduler=cosine warmup_ratio=0.05 max_new_tokens=40 limit=50; do
        usual "${REPLY%%=*}" "${REPLY#*=}"
    done
    setting PAIRS languages Swahili,German,Spanish,Russian,Chinese
    PAIRS_LANGUAGES=$REPLY
    setting EVALUATION languages English,Swahili,German,Spanish,Russian,Chinese
    EVALUATION_LANGUAGES=$REPLY
fi

need() {
    setting "" "$1" "${2-}"
    printf '%s' "$REPLY"
}
task=$(need task math_mgsm)
results_dir=$(need results_dir results/bridges)
output_dir=$(need output_dir outputs)
save_name=$(need save_name bridges)
seeds=$(need seeds 0,1,2)
rates=$(need lrs "2e-5 1e-4 6e-4")
fixed_rate=$(need lr)
translator=$(need translator)
translate_test=$(need translate_test)
first_seed=${seeds%%,*}
read -r -a rates <<<"${rates//,/ }"
trained_task=$(python -c '
import sys
from mindmerger.tasks import find_task
print(find_task(sys.argv[1]).training_name)' "$task" 2>/dev/null) ||
    fail "TASK is '$task', which is not a task: see python run_evaluation.py --help"
table=() candidates=()
plan=$results_dir/plan.tsv
at_once=${JOBS:-1}
if [[ $at_once -gt 1 && -n ${NUM_GPUS-}${HOSTFILE-}${DEEPSPEED_ARGS-} ]]; then
    fail "JOBS is $at_once: under the launcher one training runs at a time, leave it out"
fi

if [[ -n $small && ! -f $LLM_PATH/config.json ]]; then
    printf '=== Small world\n'
    # The extra arguments are words on purpose.
    # shellcheck disable=SC2086
    python -m scripts.tiny_world --output_dir "$world" --seed "${QUICKSTART_SEED:-0}" ${QUICKSTART_WORLD_ARGS:-}
    mkdir -p "$world/.finished"
    : >"$world/.finished/Small-world" # quickstart.sh then takes it as its own
fi
mkdir -p "$results_dir/logs" "$results_dir/finished" "$results_dir/lr"
if [[ $at_once -gt 1 ]]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os, sys
print(max(1, (os.cpu_count() or 1) // int(sys.argv[1])))' "$at_once")}
    # A process with threads of its own, in company, must not spin for them.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
fi

adapter_flags="adapter adapter_rank adapter_alpha adapter_dropout adapter_targets"
own_variables=pairs_share # begins as the variables of the stages on pairs do
control="LLM + adapter" # as the plan calls it

# stage_flags DATA: puts the flags of a stage that reads it into `command_line`, without the bridge's own.
stage_flags() {
    local prefix=TASK also=""
    local published=(train_num=30000 train_micro_batch_size_per_gpu=2 max_seq_len=512 max_gen_len=512)
    if [[ $1 == pairs ]]; then
        prefix=PAIRS published=(train_num=100000 train_micro_batch_size_per_gpu=8 max_seq_len=200 max_gen_len=200)
    fi
    # Such a stage reads English alone.
    if [[ $1 == english_task ]]; then also=languages; fi
    published+=(train_batch_size=128 micro_batch_tokens=4096 dev_size=3000)
    read_flags mindmerger.training.flags deepspeed task local_rank gpu
    stages=(PAIRS TASK) closed="$owned $adapter_flags"
    refuse_misspelt run_training.py
    command_line=(--task "$trained_task")
    add_settings "$prefix" "${published[@]}"
    # Names with blanks between them are several words on purpose.
    # shellcheck disable=SC2086
    add_variables "$prefix" $owned $adapter_flags $also "${published[@]%%=*}"
}

# without_encoder: drops from `command_line` what the LLM alone has no use for.
without_encoder() {
    local word kept=()
    for word in "${command_line[@]}"; do
        if [[ $word != --cache_encoder_states ]]; then kept+=("$word"); fi
    done
    command_line=("${kept[@]}")
}

# finish SLUG LABEL MADE COMMAND...: runs it unless the very same command has finished before and left MADE.
finish() {
    local stamp=$results_dir/finished/$1 label=$2 made=$3 log=$results_dir/logs/$1.log
    shift 3
    if [[ -f $stamp && $(<"$stamp") == "$*" ]] && compgen -G "$made" >/dev/null; then
        printf '=== %s: finished before\n' "$label"
        return 0
    fi
    attempt "$label" "$log" "$@" || return 1
    printf '%s' "$*" >"$stamp"
}

# ahead FUNCTION ARGUMENT...: runs it in the background, JOBS at once, all of them for `wait`. The same call afterwards
# then finds it finished, or meets the same refusal and has it said.
ahead() {
    if [[ $(jobs -rp | wc -l) -ge $at_once ]]; then wait; fi
    set -m # a process group of its own, which can be ended whole
    ("$@") </dev/null >/dev/null 2>&1 &
    set +m
}

end_what_runs_ahead() {
    local group
    for group in $(jobs -rp); do kill -- "-$group" 2>/dev/null || true; done
}
trap end_what_runs_ahead EXIT

# slug_of BRIDGE: puts what names its files into REPLY; options of the bridge are part of it.
slug_of() {
    REPLY=adapter
    if [[ $1 != "$control" ]]; then REPLY=$(printf '%s' "$1" | tr -cs 'A-Za-z0-9_.' '-'); fi
    REPLY=${REPLY%-}
}

# train_bridge BRIDGE LR SEED PHASE: trains its stages in order. The last one's folder is then in `trained`. False, with
# the reason in REPLY, when a stage is refused.
train_bridge() {
    local name command_line=() program=() phase bridge seed stage data steps epochs words
    slug_of "$1"
    name=$save_name-$REPLY-lr$2-seed$3
    if [[ $4 == search ]]; then name+=-search; fi
    while IFS=$'\t' read -r phase bridge seed stage data steps epochs words <&4; do
        if [[ "$phase|$bridge|$seed" != "$4|$1|$3" ]]; then continue; fi
        stage_flags "$data"
        program=(python run_training.py)
        if [[ -n ${NUM_GPUS-}${HOSTFILE-}${DEEPSPEED_ARGS-} ]]; then program=(launch run_training.py --deepspeed); fi
        trained=$output_dir/$name/$trained_task/$stage
        # Several words on purpose: --bridge and its options.
        # shellcheck disable=SC2206
        command_line+=($words)
        if [[ $bridge == "$control" ]]; then
            without_encoder
            command_line+=("${adapter_words[@]}")
            trained=$output_dir/$name/$trained_task/llm_adapter
        fi
        command_line+=(--stage_name "$stage" --lr "$2" --seed "$seed" --max_steps "$steps" --epoch_num "$epochs")
        command_line+=(--output_dir "$output_dir" --save_name "$name")
        finish "$name-$stage" "$bridge, seed $seed, learning rate $2: $stage" "$trained/config.json" \
            "${program[@]}" "${command_line[@]}" || return 1
    done 4<"$plan"
}

# choose_rate BRIDGE: puts the learning rate into `rate` and how it was found into `found`; false as train_bridge.
choose_rate() {
    local phase=full tried reason="" file
    if [[ -n $fixed_rate ]]; then
        rate=$fixed_rate found="$fixed_rate, given"
        return 0
    fi
    if grep -q "^search" "$plan"; then phase=search; fi
    candidates=()
    if [[ $at_once -gt 1 ]]; then
        printf '=== %s: learning rates %s, %d at once; their output is in %s\n' "$1" "${rates[*]}" "$at_once" \
            "$results_dir/logs"
        for tried in "${rates[@]}"; do ahead train_bridge "$1" "$tried" "$first_seed" "$phase"; done
        wait
    fi
    for tried in "${rates[@]}"; do
        if train_bridge "$1" "$tried" "$first_seed" "$phase"; then
            candidates+=("$tried=$trained")
        else
            reason=$REPLY
            printf '=== %s: learning rate %s is out: %s\n' "$1" "$tried" "$reason"
        fi
    done
    REPLY="no learning rate of ${rates[*]} trains it: $reason"
    [[ ${#candidates[@]} -gt 0 ]] || return 1
    slug_of "$1"
    file=$results_dir/lr/$REPLY.json
    rate=$(python -m scripts.bridge_plan choose --output "$file" "${candidates[@]}") || exit
    found="$rate of ${rates[*]}"
    printf '=== %s: learning rate %s (dev losses in %s)\n' "$1" "$found" "$file"
}

# evaluate_row LABEL SLUG ARGUMENT...
evaluate_row() {
    # Tasks may share their trainings.
    local label=$1 slug=$task-$2 made command_line=() program=(python run_evaluation.py)
    shift 2
    # A folder of its own: beside generated answers the wrong one of two could be taken for this row.
    setting EVALUATION scoring
    last_argument scoring "$REPLY" ${extra[@]+"${extra[@]}"}
    if [[ $REPLY == likelihood ]]; then slug+=-likelihood; fi
    command_line=(--task "$task" --results_dir "$results_dir/evaluations" --save_name "$slug")
    read_flags mindmerger.evaluation.flags deepspeed task local_rank gpu train_batch_size \
        train_micro_batch_size_per_gpu
    stages=(EVALUATION) closed=$given_to_rows
    refuse_misspelt run_evaluation.py
    # Names with blanks between them are several words on purpose.
    # shellcheck disable=SC2086
    add_variables EVALUATION $given_to_rows
    if [[ -n ${NUM_GPUS-}${HOSTFILE-}${DEEPSPEED_ARGS-} ]]; then
        program=(launch run_evaluation.py --deepspeed)
    fi
    made="$results_dir/evaluations/$slug/*/results.json"
    if finish "evaluation-$slug" "$label: evaluation" "$made" "${program[@]}" "${command_line[@]}" "$@" \
        ${extra[@]+"${extra[@]}"}; then
        made=$(compgen -G "$made" | head -n 1)
        table+=(--row "$label=${made%/results.json}")
    else
        missing "$label, $slug" "$REPLY"
    fi
}

extra=("$@")
setting "" llm_path
llm=$REPLY
setting "" mt_path
encoder=$REPLY
[[ -n $encoder ]] || fail "MT_PATH is not given: the encoder, which every bridge stands behind"

printf '=== Plan, seeds %s\n' "$seeds"
plan_words=()
for data in pairs question_pairs task english_task; do
    stage_flags "$data"
    add_settings "" epoch_num=3
    for word in "${command_line[@]}" --seed "$first_seed"; do plan_words+=("--$data=$word"); done
done
command_line=()
add_settings "" adapter=lora
if [[ $REPLY == none ]]; then
    no_control="ADAPTER is none"
elif ! python -c 'import peft' 2>/dev/null; then
    no_control="an adapter needs the package peft: pip install peft"
else
    no_control=""
    # Names with blanks between them are several words on purpose.
    # shellcheck disable=SC2086
    add_settings "" ${adapter_flags#adapter }
    adapter_words=("${command_line[@]}")
    for word in "${adapter_words[@]}"; do plan_words+=("--adapter_word=$word"); done
    plan_words+=(--control)
fi
command_line=()
add_settings "" target_tokens search_tokens pairs_share
for name in $(compgen -e | grep -x '[A-Z_]*_OPTIONS' || true); do
    # Other programs have such variables too: JAVA_OPTIONS.
    known=${known-$(python -c 'from mindmerger.bridges import BRIDGES; print(*BRIDGES)')}
    bridge=$(printf '%s' "${name%_OPTIONS}" | tr '[:upper:]' '[:lower:]')
    if [[ " $known " != *" $bridge "* ]]; then continue; fi
    for word in ${!name}; do plan_words+=(--bridge_option "$bridge:$word"); done
done
setting "" bridges
python -m scripts.bridge_plan plan --output "$results_dir/plan.json" --bridges "${REPLY// /,}" --seeds "$seeds" \
    ${command_line[@]+"${command_line[@]}"} "${plan_words[@]}" >"$plan.unfinished" 2>"$results_dir/logs/plan.log" || {
    code=$?
    cat "$results_dir/logs/plan.log" >&2
    exit "$code"
}
mv "$plan.unfinished" "$plan"
names=()
while read -r one; do names+=("$one"); done < <(cut -f 2 "$plan" | uniq)
printf '    %s\n' "${names[*]}"

# run_seed BRIDGE SEED: trains it with the rate in `rate` and evaluates it, also with the prefix of another question.
run_seed() {
    local slug given=()
    slug_of "$1"
    slug=$save_name-$REPLY-lr$rate-seed$2
    if ! train_bridge "$1" "$rate" "$2" full; then
        missing "$1, seed $2" "$REPLY"
        return
    fi
    if [[ $1 == "$control" ]]; then
        evaluate_row "$1" "$slug" --llm_only --llm_path "$llm" --adapter_path "$trained/adapter"
        return
    fi
    given=(--llm_path "$llm" --mt_path "$encoder" --init_checkpoint "$trained")
    evaluate_row "$1" "$slug" "${given[@]}"
    # Of other rows every row's partner is another: such an evaluation is never extended.
    setting EVALUATION limit
    last_argument limit "$REPLY" ${extra[@]+"${extra[@]}"}
    evaluate_row "$1 (shuffled prefix)" "$slug-shuffled${REPLY:+-$REPLY}" "${given[@]}" --probe_prefix shuffled
}

evaluate_row "LLM alone" llm --llm_only --llm_path "$llm"
rates_found=()
for one in "${names[@]}"; do
    if ! choose_rate "$one"; then
        missing "$one" "$REPLY"
        continue
    fi
    rates_found+=(--lr "$one=$found")
    if [[ $at_once -gt 1 ]]; then
        printf '=== %s: seeds %s, %d at once\n' "$one" "$seeds" "$at_once"
        for seed in ${seeds//,/ }; do ahead run_seed "$one" "$seed"; done
        wait
    fi
    for seed in ${seeds//,/ }; do run_seed "$one" "$seed"; done
done
if [[ -n $no_control ]]; then missing "$control" "$no_control"; fi
label="translate-test (machine)"
if [[ -n $translator && -z $translate_test ]]; then
    if translate_questions EVALUATION "$label"; then
        translate_test=$REPLY
    else
        missing "$label" "$REPLY"
    fi
fi
if [[ -n $translate_test ]]; then
    evaluate_row "$label" translate-test --llm_only --llm_path "$llm" --translate_test "$translate_test"
fi
missing "st_merge" "not reproduced: its code is not published; docs/bridges.md has the published numbers"

printf '=== Table\n'
python -m mindmerger.evaluation.bridge_table "${table[@]}" ${rates_found[@]+"${rates_found[@]}"} \
    --costs "$results_dir/plan.json" --output_dir "$results_dir"
