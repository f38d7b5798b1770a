"""--chat_template, in every command that has it; needs no model's library."""

AUTO, NONE = "auto", "none"
TUNING_RECORD = "tune.json"  # in the folder of an LLM that scripts.tune_llm wrote


def add_argument(add, first: str = "") -> None:
    """Adds the flag, by a parser's or a group's `add_argument`.

    Args:
        first: what decides before the LLM does, where the flag is not given.
    """
    add("--chat_template", choices=(AUTO, NONE), help="chat template around the prompt: auto takes that of the LLM's "
        "tokenizer, where it has one; the mapped source stays before it (default: "
        f"{first}as scripts.tune_llm tuned the LLM, else none)")  # fmt: skip
