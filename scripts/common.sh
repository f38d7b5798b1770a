# shellcheck shell=bash
# Sourced by the reproduction scripts beside it; does nothing on its own. Works with bash 3.2 and later.
#
# Every flag --NAME of the Python program can be given as a variable. Its value is the first of
#   1. <STAGE>_<NAME>  in the environment, for one stage only   (MAPPING_TRAIN_NUM=5000, AUGMENTATION_TRAIN_NUM=2000)
#   2. <NAME>          in capitals                              (TRAIN_NUM=5000)
#   3. <name>          as the flag is written                   (train_num=5000)
#   4. what the file CONFIG, or <STAGE>_CONFIG, sets, as --config of the program takes it
#   5. the published value.
# A flag's second name does as well (LEARNING_RATE for LR), one of the two at a time. Arguments after the script's name
# come last on the command line, so they win over all of these. A flag without a value takes 1 or 0 (DRY_RUN=1). A
# <STAGE>_ variable that names no flag is refused: a misspelt one would change nothing, for days. --task, --stage_name and
# what the launcher passes are the scripts' own.
#
# The launcher: NUM_GPUS, NUM_NODES, HOSTFILE, MASTER_ADDR, MASTER_PORT, and DEEPSPEED_ARGS for anything else it takes.
# STAGE_NAME=mapping or STAGE_NAME=augmentation runs that stage alone.
# A script for another bridge than MindMerger's sets `stages` to that bridge's after sourcing this file.

stages=(mapping augmentation)

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# lacking_packages: prints which packages the python on PATH lacks. They are looked for and not imported: 0.1 s, not 10.
lacking_packages() {
    python -c '
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None), sep=", ")
' torch transformers tokenizers datasets deepspeed safetensors
}

how_to_install="run 'source scripts/setup_venv.sh', or activate the environment that holds requirements.txt"

# use_environment PROGRAM: python or deepspeed as it stands on PATH, where python has the packages: an environment that
# is active comes first. Else the one that setup_venv.sh makes: nearly every machine has a python without them.
use_environment() {
    local name lacking=""
    if ! command -v "$1" >/dev/null 2>&1 || ! lacking=$(lacking_packages 2>/dev/null) || [[ -n $lacking ]]; then
        if [[ -f .venv/bin/activate ]]; then
            # shellcheck disable=SC1091
            source .venv/bin/activate
            lacking=$(lacking_packages 2>/dev/null) || true
        fi
    fi
    for name in python "$1"; do
        command -v "$name" >/dev/null 2>&1 || fail "$name is not on PATH: $how_to_install"
    done
    [[ -z $lacking ]] || fail "$(command -v python) lacks $lacking: $how_to_install"
}

# setting PREFIX NAME [DEFAULT]: puts the value that holds into REPLY, empty if there is none.
setting() {
    local entry spelled capitals candidate names=("$2") found=""
    for entry in ${other_names-}; do
        if [[ ${entry#*=} == "$2" ]]; then names+=("${entry%%=*}"); fi
    done
    REPLY=""
    for spelled in "${names[@]}"; do
        capitals=$(printf '%s' "$spelled" | tr '[:lower:]' '[:upper:]')
        for candidate in ${1:+"${1}_${capitals}"} "$capitals" "$spelled"; do
            if [[ -z ${!candidate-} ]]; then continue; fi
            [[ -z $found ]] || fail "$found and $candidate in the environment name one setting: unset one of them"
            REPLY=${!candidate} found=$candidate
            break
        done
    done
    if [[ -n $REPLY ]]; then return; fi
    REPLY=${3-}
    while IFS= read -r entry; do
        if [[ ${entry%%=*} == "$2" ]]; then REPLY=${entry#*=}; fi
    done <<<"${configured-}"
}

# add_settings PREFIX NAME[=DEFAULT]...: appends --NAME VALUE to `command_line` for each that has a value.
add_settings() {
    local prefix=$1 entry published_value
    shift
    for entry in "$@"; do
        published_value=""
        if [[ $entry == *=* ]]; then published_value=${entry#*=}; fi
        setting "$prefix" "${entry%%=*}" "$published_value"
        if [[ -n $REPLY ]]; then
            command_line+=("--${entry%%=*}" "$REPLY")
        fi
    done
}

# read_flags MODULE OWNED...: puts the flags of the module's parser but those OWNED by the caller into `value_flags` and
# `switches`, and their second names into `other_names`, each as SECOND=FIRST. The parser is asked, since a list here
# would fall behind it; once per program, as it costs 0.2 s.
read_flags() {
    local found
    if [[ ${flags_read-} == "$*" ]]; then return; fi
    found=$(python -c '
import importlib, sys
module, *owned = sys.argv[1:]
flags, others = {}, []
for action in importlib.import_module(module).build_parser()._actions:
    first, *more = [name[2:] for name in action.option_strings if name.startswith("--")]
    if first not in [*owned, "help", "config"]:  # read_config has the last
        flags[first] = action.nargs
        others += [f"{name}={first}" for name in more]
for nargs in (None, 0):
    print(*(name for name, wanted in flags.items() if wanted == nargs))
print(*others)
' "$@") || fail "the flags of $1 cannot be read, for the reason above: is this the environment that holds requirements.txt?"
    value_flags=${found%%$'\n'*} found=${found#*$'\n'} flags_read=$*
    switches=${found%%$'\n'*} other_names=${found#*$'\n'}
}

# refuse_owned WHERE NAME...: stops at a flag that is the caller's own, of `row_flags`: NAME=WHAT TO DO INSTEAD each.
refuse_owned() {
    local where=$1 name entry
    shift
    for name in "$@"; do
        for entry in "${row_flags[@]}"; do
            [[ ${entry%%=*} != "$name" ]] || fail "$name $where is the script's own: ${entry#*=}"
        done
    done
}

# refuse_owned_arguments ARGUMENT...: the same for arguments, in both spellings.
refuse_owned_arguments() {
    local word
    for word in "$@"; do
        if [[ $word == --* ]]; then
            word=${word#--}
            refuse_owned "among the arguments" "${word%%=*}"
        fi
    done
}

# read_config MODULE PREFIX ARGUMENT...: puts what the file that CONFIG names sets into `configured`, a NAME=VALUE a line.
# The program is not told of the file: on its command line the published values would win over it.
read_config() {
    local module=$1 prefix=$2
    shift 2
    last_argument config "" "$@"
    [[ -z $REPLY ]] || fail "--config $REPLY would lose to the published settings: say CONFIG=$REPLY before the script"
    configured=""
    setting "$prefix" config
    if [[ -z $REPLY ]]; then return; fi
    configured=$(python -m mindmerger.runtime.config_file "$module" "$REPLY") || exit 2
}

# by_first_names ARGUMENT...: puts the arguments into `arguments`, flags by their first names: the last one then wins,
# whichever name it has.
by_first_names() {
    local word entry
    arguments=()
    for word in "$@"; do
        for entry in $other_names; do
            if [[ ${word%%=*} == "--${entry%%=*}" ]]; then word=--${entry#*=}${word#"${word%%=*}"}; fi
        done
        arguments+=("$word")
    done
}

# add_variables PREFIX EXCEPT...: appends each flag that `read_flags` found and a variable sets.
add_variables() {
    local prefix=$1 name
    shift
    for name in $value_flags; do
        if [[ " $* " != *" $name "* ]]; then add_settings "$prefix" "$name"; fi
    done
    for name in $switches; do
        if [[ " $* " == *" $name "* ]]; then continue; fi
        setting "$prefix" "$name"
        if is_on "$name" "$REPLY"; then command_line+=("--$name"); fi
    done
}

# is_on NAME VALUE: true for 1, false for 0 and where there is none.
is_on() {
    case $2 in
        1 | [Tt]rue | [Yy]es) return 0 ;;
        "" | 0 | [Ff]alse | [Nn]o) return 1 ;;
        *) fail "$1 is '$2' in the environment: --$1 takes no value, so say 1 or 0" ;;
    esac
}

# refuse_misspelt PROGRAM: stops at a variable for one stage that no flag has the name of, nor a script's own variable
# in `own_variables`, or one of `closed`, the flags that the script gives itself.
refuse_misspelt() {
    local name prefix flag open known=" $value_flags $switches config ${own_variables-} "
    for name in $other_names; do known+="${name%%=*} "; done
    open=$known
    for flag in ${closed-}; do
        open=${open// $flag / }
        for name in $other_names; do
            if [[ ${name#*=} == "$flag" ]]; then open=${open// ${name%%=*} / }; fi
        done
    done
    for name in $(compgen -e); do
        flag=$(printf '%s' "$name" | tr '[:upper:]' '[:lower:]')
        if [[ $known == *" $flag "* ]]; then continue; fi # ADAPTER_RANK, where a stage is called adapter
        for prefix in $(printf '%s\n' "${stages[@]}" | tr '[:lower:]' '[:upper:]'); do
            if [[ $name != "$prefix"_* ]]; then continue; fi
            flag=$(printf '%s' "${name#"$prefix"_}" | tr '[:upper:]' '[:lower:]')
            [[ $open == *" $flag "* ]] ||
                fail "$name is in the environment, but no flag --$flag of $1 is open to variables: correct or unset it"
        done
    done
}

# refuse_variable NAME[=INSTEAD]: stops where a variable sets a flag that has no part in what a script does.
refuse_variable() {
    local name=${1%%=*} instead=""
    if [[ $1 == *=* ]]; then instead=", ${1#*=} is for that"; fi
    setting "" "$name"
    if [[ -z $REPLY ]]; then return; fi
    if [[ " $switches " == *" $name "* ]] && ! is_on "$name" "$REPLY"; then return; fi
    fail "a variable sets --$name to '$REPLY', which has no part in this comparison: unset it$instead"
}

# Flags without a part in the comparison of bridges: compare_bridges.sh refuses variables of their names, who calls it
# from another script has to unset them.
not_compared=(seed=SEEDS max_steps=TARGET_TOKENS bridge=BRIDGES "bridge_option=<BRIDGE>_OPTIONS" stage_name
    init_checkpoint augmentation dry_run overwrite_output_dir resume_from_checkpoint allow_changed llm_only probe_prefix
    parallel_input translations parallel_languages order adapter_path)

# refuse_config PREFIX...: stops where CONFIG names a file, or <PREFIX>_CONFIG.
refuse_config() {
    local prefix
    for prefix in "" "$@"; do
        setting "$prefix" config
        [[ -z $REPLY ]] || fail "CONFIG is '$REPLY', and this script reads no such file: say its settings as variables"
    done
}

# launch PROGRAM ARGUMENT...: one process per GPU, on this node or on those of HOSTFILE.
launch() {
    local options=() word
    if [[ -n ${HOSTFILE-} ]]; then
        # DeepSpeed would merely warn and train on this node alone.
        [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file"
        options+=(--hostfile "$HOSTFILE")
    fi
    if [[ -n ${NUM_NODES-} ]]; then options+=(--num_nodes "$NUM_NODES"); fi
    if [[ -n ${NUM_GPUS-} ]]; then options+=(--num_gpus "$NUM_GPUS"); fi
    if [[ -n ${MASTER_ADDR-} ]]; then options+=(--master_addr "$MASTER_ADDR"); fi
    if [[ -n ${MASTER_PORT-} ]]; then options+=(--master_port "$MASTER_PORT"); fi
    # Its own messages name every process and command, also after ours that says what is wrong.
    case " ${DEEPSPEED_ARGS-} " in
        *" -q "* | *" --quiet "* | *" --log_level"*) ;;
        *) options+=(--log_level critical) ;;
    esac
    for word in ${DEEPSPEED_ARGS-}; do options+=("$word"); done
    use_environment deepspeed
    deepspeed ${options[@]+"${options[@]}"} "$@"
}

# train TASK STAGE NAME=PUBLISHED... -- ARGUMENT...
train() {
    local task=$1 stage=$2 published=() prefix command_line arguments known=${stages[*]} wanted own_start configured
    shift 2
    wanted=${STAGE_NAME:-${stage_name:-$stage}}
    case " $known " in
        *" $wanted "*) if [[ $wanted != "$stage" ]]; then return; fi ;;
        *) fail "STAGE_NAME is '$wanted': it may be ${known// / or }" ;;
    esac
    while [[ $1 != -- ]]; do
        published+=("$1")
        shift
    done
    shift
    prefix=$(printf '%s' "$stage" | tr '[:lower:]' '[:upper:]')
    command_line=(--deepspeed --task "$task" --stage_name "$stage")
    use_environment deepspeed
    read_flags mindmerger.training.flags deepspeed task stage_name local_rank gpu
    refuse_misspelt run_training.py
    read_config mindmerger.training.flags "$prefix" "$@"
    # Others are passed only when set: the program's own defaults are the published ones.
    add_settings "$prefix" "${published[@]}"
    add_variables "$prefix" init_checkpoint "${published[@]%%=*}"
    # INIT_CHECKPOINT is where the whole run starts: the later stage then starts from the earlier one's mapping.
    own_start=${prefix}_INIT_CHECKPOINT
    if [[ $stage == "${stages[0]}" || -n ${STAGE_NAME:-${stage_name-}} || -n ${!own_start-} ]]; then
        add_settings "$prefix" init_checkpoint
    fi
    by_first_names "$@"
    launch run_training.py "${command_line[@]}" ${arguments[@]+"${arguments[@]}"}
}

# last_argument NAME DEFAULT ARGUMENT...: puts the value of the last --NAME among the arguments, else DEFAULT, into REPLY.
last_argument() {
    local wanted=--$1
    REPLY=$2
    shift 2
    while [[ $# -gt 0 ]]; do
        case $1 in
            "$wanted") REPLY=${2-$REPLY} ;;
            "$wanted"=*) REPLY=${1#*=} ;;
        esac
        shift
    done
}

# evaluate TASK TRAINED_TASK NAME=PUBLISHED... -- ARGUMENT...
# The mapping defaults to what the training of TRAINED_TASK left: the bridge's last stage that is there. The LLM alone
# needs none.
evaluate() {
    local task=$1 trained_task=$2 published=() command_line arguments trained word alone="" configured
    shift 2
    while [[ $1 != -- ]]; do
        published+=("$1")
        shift
    done
    shift
    use_environment deepspeed
    # The last two change nothing in an evaluation, and may be set for the training before it.
    read_flags mindmerger.evaluation.flags deepspeed task local_rank gpu train_batch_size \
        train_micro_batch_size_per_gpu
    read_config mindmerger.evaluation.flags "" "$@"
    setting "" llm_only
    if is_on llm_only "$REPLY"; then alone=yes; fi
    for word in "$@"; do
        if [[ $word == --llm_only ]]; then alone=yes; fi
    done
    command_line=(--deepspeed --task "$task")
    if [[ -z $alone ]]; then
        setting "" output_dir outputs
        trained=$REPLY
        setting "" save_name MindMerger
        last_argument save_name "$REPLY" "$@"
        published+=("init_checkpoint=$trained/$REPLY/$trained_task")
        setting "" bridge mindmerger
        last_argument bridge "$REPLY" "$@"
        # Published for MindMerger; what another bridge's LLM reads is what its last stage trains.
        if [[ $REPLY == mindmerger ]]; then published+=(augmentation=True); else published+=(augmentation); fi
    fi
    add_settings "" "${published[@]}"
    # The LLM alone takes no mapping, whatever the training before it was told.
    add_variables "" init_checkpoint augmentation "${published[@]%%=*}"
    by_first_names "$@"
    launch run_evaluation.py "${command_line[@]}" ${arguments[@]+"${arguments[@]}"}
}

# What the two comparisons share. `table` holds the arguments of the table, in its order.

missing() { # LABEL REASON
    printf '=== %s: missing: %s\n' "$1" "$2"
    table+=(--missing "$1=$2")
}

# attempt LABEL LOG COMMAND...: true when it succeeded. A refused input (exit code 2) puts the command's own line into
# REPLY and is false; anything else ends the script.
attempt() {
    local label=$1 file=$2 code=0
    shift 2
    printf '=== %s\n    %s\n' "$label" "$*"
    { "$@" 2>&1 >&3 | tee "$file" >&2; } 3>&1 || code=$?
    if [[ $code -eq 0 ]]; then return 0; fi
    if [[ $code -ne 2 ]]; then
        printf 'error: the command of the row "%s" ended with exit code %d; its messages are in %s\n' "$label" "$code" \
            "$file" >&2
        exit "$code"
    fi
    REPLY=$(grep -a -m 1 '^error: ' "$file" || true)
    REPLY=${REPLY#error: }
    REPLY=${REPLY:-refused, see $file}
    return 1
}

# translate_questions PREFIX LABEL: has `translator` translate into English what is evaluated, whether a variable, with
# PREFIX or without, or an argument in `extra` says what that is. Puts the folder of the translations into REPLY; false,
# with the reason there, where that is refused.
translate_questions() {
    local label=$2 name folder=$results_dir/translations/$task
    local command_line=(--task "$task" --translator "$translator" --output_dir "$folder")
    for name in data_root languages languages_file limit precision; do
        setting "$1" "$name"
        last_argument "$name" "$REPLY" ${extra[@]+"${extra[@]}"}
        if [[ -n $REPLY ]]; then command_line+=("--$name" "$REPLY"); fi
    done
    setting "$1" skip_faulty_rows
    if is_on skip_faulty_rows "$REPLY"; then command_line+=(--skip_faulty_rows); fi
    # Names with blanks between them are several words on purpose.
    # shellcheck disable=SC2086
    attempt "$label" "$results_dir/logs/translations.log" python -m mindmerger.baselines.translate_test \
        "${command_line[@]}" ${TRANSLATOR_ARGS-} || return 1
    REPLY=$folder
}
