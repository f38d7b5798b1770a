"""Chat templates of instruction-tuned LLMs: the two texts that one puts around a prompt, and what ends the answer.

The merged sequence stays `<bos>` · prefix · prompt · target; with a template the prompt is a whole user turn and the
start of the assistant's. Its text is fixed when it is first used and recorded in `config.json`, so that an evaluation
takes what was trained, whatever the LLM's folder says by then.
"""

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from mindmerger.hub.model_files import ModelError, read_json_object
from mindmerger.hub.tokenizer_files import load_tokenizer
from mindmerger.runtime.chat_template import AUTO, NONE, TUNING_RECORD
from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.files import model_path
from mindmerger.runtime.processes import warn

# Templates that write today's date get this one, Llama's own where it knows no clock: else every day had other prompts.
DAY = datetime(2024, 7, 26)
DIRECTIVES = ("%Y", "%y", "%m", "%B", "%b", "%d", "%j", "%A", "%a", "%H", "%M", "%S")
# Texts that no template treats specially; blanks around the first show whether they are kept.
PROBES, ANSWER = (" \nQuestion one?\n ", "2: b"), "Answer one."


@dataclass(frozen=True)
class ChatTemplate:
    """What stands before and after a prompt, and the token that ends the assistant's turn.

    strips: whether blanks at both ends of a prompt go, as the template has it. drops_bos: whether `before` begins with
    the LLM's BOS, whose token is taken off again: the merged sequence has it already, before the prefix.
    """

    before: str
    after: str
    end: str
    strips: bool = False
    drops_bos: bool = False

    def wrap(self, prompt: str, shrinkable: tuple[int, int]) -> tuple[str, tuple[int, int]]:
        """Returns a prompt inside the template, and where its shrinkable span then is."""
        start, end = shrinkable
        if self.strips:
            blanks, prompt = len(prompt) - len(prompt.lstrip()), prompt.strip()
            start, end = (min(max(0, one - blanks), len(prompt)) for one in (start, end))
        return self.before + prompt + self.after, (len(self.before) + start, len(self.before) + end)

    def record(self) -> dict:
        """Returns it as `config.json` and `results.json` hold it."""
        return dataclasses.asdict(self)

    def end_id(self, tokenizer, path: str) -> int:
        """Returns the id of the token that ends a turn.

        Raises:
            ModelError: where the tokenizer of `path` does not know it.
        """
        found = tokenizer.get_vocab().get(self.end)
        if found is None:
            raise ModelError(
                f"the tokenizer of {path} has no token {self.end!r}, in which answers end by the chat template: take "
                "the LLM that the template belongs to"
            )
        return found


def read_template(record: dict | None, where: str) -> ChatTemplate | None:
    """Returns the template of a `ChatTemplate.record`, None for None.

    Raises:
        ModelError: for a record that is none, naming `where` it is.
    """
    if record is None:
        return None
    fields = {field.name: field.type for field in dataclasses.fields(ChatTemplate)}
    if record.keys() != fields.keys() or not all(isinstance(record[name], kind) for name, kind in fields.items()):
        raise ModelError(f"{where}: chat_template must hold {', '.join(fields)}, it is {str(record)[:80]}")
    return ChatTemplate(**record)


@lru_cache(maxsize=4)  # `answer` may be called for one text after another
def find_template(path: str) -> ChatTemplate | None:
    """Returns the chat template of an LLM's tokenizer, thinking switched off where it has a switch; None without one.

    Raises:
        ModelError: for a template that cannot be used: one that fails, or writes a prompt otherwise than as a whole
            between two fixed texts.
    """
    path = model_path(path)
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None:
        return None
    written = [_render(tokenizer, path, [_turn("user", probe)], add_generation_prompt=True) for probe in PROBES]
    before, found, after = written[0].partition(PROBES[0].strip())
    strips = PROBES[0] not in written[0]
    kept = PROBES[0].partition(PROBES[0].strip())
    if not strips:
        before, after = before.removesuffix(kept[0]), after.removeprefix(kept[2])
    if not found or [before + (p.strip() if strips else p) + after for p in PROBES] != written:
        raise ModelError(
            f"the chat template of {path} does not put a prompt as a whole between two fixed texts: pass "
            f"--chat_template {NONE}"
        )
    bos = tokenizer.bos_token
    # More than one is no BOS: some LLMs name the token that begins every turn as theirs, and each turn needs its own.
    drops_bos = bool(bos) and before.startswith(bos) and (before + after).count(bos) == 1
    return ChatTemplate(before, after, _turn_end(tokenizer, path), strips, drops_bos)


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def fix_day(template: str) -> str:
    """Returns a template of which the clock, `strftime_now`, stands at `DAY`."""
    if "strftime_now" not in template:
        return template
    # A macro, for the library hands no function of ours to a template. Jinja drops the line end behind a block.
    text = "format" + "".join(f" | replace('{one}', '{DAY.strftime(one)}')" for one in DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n{template}"


def _render(tokenizer, path: str, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            turns,
            chat_template=fix_day(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            # Targets hold no thoughts, and those of a thinking LLM would use up the new tokens. Two names are usual.
            enable_thinking=False,
            thinking=False,
        )
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise ModelError(
            f"the chat template of {path} cannot be used: {one_line(error)}: pass --chat_template {NONE}"
        ) from error


def _turn_end(tokenizer, path: str) -> str:
    """Returns the token that follows an answer, the tokenizer's EOS where the template writes no other."""
    written = _render(tokenizer, path, [_turn("user", "?"), _turn("assistant", ANSWER)], add_generation_prompt=False)
    rest, eos = written.rpartition(ANSWER)[2].strip(), tokenizer.eos_token or ""
    return max((token for token in tokenizer.get_added_vocab() if rest.startswith(token)), key=len, default=eos)


def choose_template(given: str | None, path: str) -> ChatTemplate | None:
    """Returns the template that --chat_template means for the LLM at `path`; without the flag that which the LLM was
    tuned with, by its `tune.json`, else none.

    Raises:
        ModelError: for a template that cannot be used.
    """
    tuned = tuned_template(path)
    if given is None:
        return tuned
    found = find_template(path) if given == AUTO else None
    if found is None and given == AUTO:
        warn(f"--chat_template {AUTO}: the tokenizer of {path} has no chat template, prompts stay as they are")
    if tuned is not None and found != tuned:
        warn(f"{path} was tuned with another chat template than --chat_template {given} means")
    return found


def tuned_template(path: str) -> ChatTemplate | None:
    """Returns the template that an LLM was tuned with by scripts.tune_llm, None for none."""
    file = Path(path) / TUNING_RECORD
    if not file.is_file():
        return None
    identity = read_json_object(file).get("identity")
    return read_template(identity.get("--chat_template") if isinstance(identity, dict) else None, str(file))


def keep_template(given: str | None, path: str, recorded: dict | None, trained: str | None) -> ChatTemplate | None:
    """Returns the template around the prompts of an evaluation: by itself that of training, which no flag changes.

    Args:
        given: --chat_template, None without it.
        path: of the LLM.
        recorded: the template in a `config.json`.
        trained: what learnt to answer prompts in that form, in words; None where nothing did, so that the flag
            decides and the record is its default.

    Raises:
        UserError: for another one than that of training.
    """
    if trained is None and (given is not None or recorded is None):
        return choose_template(given, path)
    template = read_template(recorded, "config.json")
    if given is None or (find_template(path) if given == AUTO else None) == template:
        return template
    if template is None or given == NONE:
        how = "without" if template is None else "with"
        raise UserError(
            f"{trained} was trained {how} a chat template around the prompt: leave --chat_template {given} out"
        )
    raise UserError(
        f"{trained} was trained with another chat template than that of {path}: leave --chat_template {given} out, "
        "which takes the recorded one"
    )
