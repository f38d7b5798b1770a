"""MindMerger as a model of lm-evaluation-harness: its requests become the inputs that run_evaluation.py makes.

A request brings the finished prompt, which the LLM reads, and the raw row, of which `lm_eval_table` makes the text that
the encoder reads. Continuations are tokenised apart from the prompt, as targets are in training.

Dimension letters: B batch, C continuations of a prompt, T tokens.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from functools import cached_property

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from transformers import StoppingCriteria

from mindmerger.bridges.base import nearest
from mindmerger.data.tokenising import load_tokenizers
from mindmerger.evaluation.flags import build_parser, check_flags
from mindmerger.evaluation.models import (
    DEFAULT_BRIDGE,
    check_adapter_fits,
    check_models_fit,
    choose_chat_template,
    find_models,
    warn_of_other_precision,
    warn_of_other_quantization,
)
from mindmerger.evaluation.settings import choose_form
from mindmerger.generation.answers import (
    batch_inputs,
    check_tokens,
    input_positions,
    split_batches,
    to_generation,
    tokenise_inputs,
)
from mindmerger.generation.likelihood import label_tensors, size_of
from mindmerger.generation.loading import load_model
from mindmerger.hub.model_configs import embedding_rows, llm_config, load_config
from mindmerger.integrations.lm_eval_table import Query, find_query, source_text
from mindmerger.model.attention_memory import check_attention_function
from mindmerger.model.mapping_files import mapping_sha256, stage_of
from mindmerger.model.towers import check_positions
from mindmerger.runtime.command import versions
from mindmerger.runtime.errors import UserError
from mindmerger.runtime.precision import settle_precision
from mindmerger.runtime.processes import explain_out_of_memory, progress_bar, warn
from mindmerger.tasks import find_task
from mindmerger.tasks.base import Example
from mindmerger.tasks.languages import find_language, use_languages_file

# The model arguments: flags of run_evaluation.py by their names.
FLAGS = (
    *("init_checkpoint", "llm_path", "mt_path", "adapter_path", "bridge", "bridge_option", "augmentation", "llm_only"),
    *("precision", "quantization", "attn_implementation", "max_seq_len", "max_gen_len", "max_new_tokens"),
    *("data_root", "languages_file", "chat_template"),
)
OWN = ("query", "language")
NO_LIMIT = 2**31  # the harness leaves prompts whole, and examples in them make them long
# Of a greedy answer; anything else there would change it, and is refused.
IGNORED = {"do_sample", "temperature", "top_p", "top_k"}


@register_model("mindmerger")
class HarnessModel(LM):
    """A mapping between its two models, or the LLM alone, for `lm_eval.simple_evaluate` and its command line.

    Everything is checked when it is made; the models are loaded at the first request that can be answered.

    Args:
        batch_size: prompts at once, a number.
        device: of the models. The harness gives cuda:0 where nobody names one; without a GPU it is the CPU then.
        query: what the encoder reads, as `find_query` says; default the table's.
        language: of all rows, for encoders that read a language tag; default the task's.
        flags: of run_evaluation.py, by the names in `FLAGS`.

    Raises:
        UserError: for the first thing that does not fit.
    """

    def __init__(
        self,
        batch_size: int | str = 1,
        device: str | None = None,
        query: str | None = None,
        language: str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **flags,
    ):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("the mindmerger model of the harness runs in one process: start it without a launcher")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: the mindmerger model takes a number of at least 1")
        self.batch_size, self.query = int(batch_size), str(query) if query is not None else None
        self._device = choose_device(device)
        args = read_flags(flags)
        use_languages_file(args.languages_file)
        self.language = find_language(str(language)).name if language is not None else None
        self.max_seq_len, self.max_gen_len = args.max_seq_len, args.max_gen_len or NO_LIMIT
        self.max_new_tokens = args.max_new_tokens or find_task("math").max_new_tokens
        self._settle(args)

    def _settle(self, args: Namespace) -> None:
        check_flags(args)
        task = find_task("math")  # asked for the folder of a training alone, which has to be named here
        self.models = models = find_models(args, task)
        self.form = choose_form(args, models, task)
        precision = settle_precision(args.precision, self._device.type == "cuda")
        if models.config is not None:
            warn_of_other_precision(models.config, precision)
            warn_of_other_quantization(models.config, args.quantization)
        self.bridge = check_models_fit(models, quantization=args.quantization)
        if self.bridge is not None and self.bridge.uses_memory:
            check_attention_function(args.attn_implementation, args.engine)
        chat = choose_chat_template(args, models, self.form)
        self.tokenizers = load_tokenizers(models.encoder, models.llm, chat)
        self.encoder_text = stage_of(models.config).encoder_text if models.config is not None else "source"
        # LangBridge's encoder reads the whole prompt, and the LLM alone has none.
        self.reads_rows = models.encoder is not None and self.encoder_text == "source"
        found = {
            "llm_path": models.llm,
            "mt_path": models.encoder,
            "bridge_name": models.config.bridge if models.config is not None else DEFAULT_BRIDGE,
            "bridge": self.bridge,
            "mapping_file": models.mapping_file,
            "adapter": check_adapter_fits(models, args.engine),
            "precision": precision,
            "tokenizers": self.tokenizers,
        }
        self.settings = Namespace(**vars(args) | found)

    @cached_property
    def model(self):
        """The `MindMerger` on its device."""
        return load_model(self.settings, self._device)

    # -- requests of the harness

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns greedy answers, each cut off before the first of its request's stop strings.

        Raises:
            UserError: for sampling, and what `_columns` refuses.
        """
        wanted = [read_generation(one, self.max_new_tokens) for one in requests]
        columns = self._columns(requests, max(limit for _, limit in wanted))
        lengths, outputs = input_positions(columns, self.bridge), [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for row, one in enumerate(wanted):
            groups.setdefault(one, []).append(row)
        with progress_bar(total=len(requests), unit="example") as progress:
            for (until, limit), rows in groups.items():
                for batch in split_batches(rows, lengths, self.batch_size):
                    stop = StopAtText(self.tokenizers.llm, until, len(batch))
                    inputs = batch_inputs(self.model, self.tokenizers, columns, batch)
                    with self._explained(batch):
                        criteria = [stop] if until else []
                        ids_BT = self.model.generate(**inputs, max_new_tokens=limit, stopping_criteria=criteria)
                    for row, ids, end in zip(batch, ids_BT.tolist(), stop.ends, strict=True):
                        text = to_generation(self.model, self.tokenizers, ids[:end]).output
                        outputs[row] = postprocess_generated_text(text, list(until), None)
                    progress.update(len(batch))
        return outputs

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation in nats, and whether greedy decoding would give it; each
        prompt is read once for all its continuations.

        Raises:
            UserError: for an empty continuation, and what `_columns` refuses.
        """
        ids_of = dict(enumerate(self._continuation_ids(one) for one in requests))
        of_prompt: dict[tuple, list[int]] = {}
        for number, one in enumerate(requests):
            of_prompt.setdefault((one.task_name, one.doc_id, one.args[0]), []).append(number)
        rows = list(of_prompt.values())
        columns = self._columns([requests[row[0]] for row in rows], max(map(len, ids_of.values())), ids_of)
        found: list = [None] * len(requests)
        with progress_bar(total=len(rows), unit="example") as progress:
            for batch in split_batches(list(range(len(rows))), input_positions(columns, self.bridge), self.batch_size):
                own = [tuple(rows[i]) for i in batch]
                ids_BCT, mask_BCT = label_tensors(ids_of, own, self.tokenizers.llm_pad_id, size_of(ids_of, own))
                inputs = batch_inputs(self.model, self.tokenizers, columns, batch)
                with self._explained(batch), torch.no_grad():
                    scores = self.model.score(ids_BCT.to(self.model.device), mask_BCT, **inputs)
                log_probs_BC, greedy_BC = (one.cpu() for one in scores)
                if not log_probs_BC[mask_BCT[:, :, 0].bool()].isfinite().all():
                    raise self.model.not_finite_error()
                for numbers, log_probs, greedy in zip(own, log_probs_BC.tolist(), greedy_BC.tolist(), strict=True):
                    for number, *score in zip(numbers, log_probs, greedy, strict=False):
                        found[number] = tuple(score)
                progress.update(len(batch))
        return found

    def loglikelihood_rolling(self, requests: list[Instance]):
        """Refuses, since a running text has no question that an encoder could read.

        Raises:
            UserError: always.
        """
        names = ", ".join(dict.fromkeys(one.task_name for one in requests))
        raise UserError(
            f"loglikelihood_rolling (task {names}) is the perplexity of running text, which has no question for the "
            "encoder: leave these tasks out"
        )

    # -- what else the harness asks

    def set_cache_hook(self, cache_hook) -> None:
        """Refuses --use_cache: its keys are prompts, without the row that the encoder reads and without the model.

        Raises:
            UserError: where a cache is asked for.
        """
        if cache_hook.dbdict is not None:
            raise UserError(
                "--use_cache knows neither the model nor the encoder's text, and would give the answers of other ones: "
                "leave it out"
            )
        super().set_cache_hook(cache_hook)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Refuses --apply_chat_template, which would put the harness's prompt into a template that no mapping knows.

        Raises:
            UserError: where a template is asked for.
        """
        if chat_template:
            raise UserError(
                "--apply_chat_template is not for the mindmerger model, which takes the template of training by "
                "itself: leave it out"
            )
        return ""

    def get_model_info(self) -> dict:
        """Returns what the harness's results file records of the model."""
        mapping = self.models.mapping_file
        return {
            "llm": self.models.llm,
            "encoder": self.models.encoder,
            "mapping": mapping,
            "mapping_sha256": mapping_sha256(mapping) if mapping is not None else None,
            "form": self.form,
            "precision": self.settings.precision,
            "quantization": self.settings.quantization,
            "chat_template": self.tokenizers.chat.record() if self.tokenizers.chat is not None else None,
            "encoder_text": self.query or "by task",
            "versions": versions(),
        }

    # -- inputs

    def _columns(self, requests: Sequence[Instance], new_tokens: int, targets: dict | None = None) -> dict:
        """Returns what the model reads of each request, as `tokenise_inputs` does.

        Args:
            new_tokens: the most that follow an input.
            targets: ids of continuations, which are checked too.

        Raises:
            UserError: for a task whose encoder's text or language is not known, and inputs that do not fit a model.
        """
        columns = tokenise_inputs(
            self.tokenizers,
            [self._example(i, one) for i, one in enumerate(requests)],
            with_source=self.form != "llm_only",
            with_prompt=self.form != "hard",
            max_seq_len=self.max_seq_len,
            max_gen_len=self.max_gen_len,
            encoder_text=self.encoder_text,
        )
        for name, flag in (("source_cut", "max_seq_len"), ("prompt_cut", "max_gen_len")):
            if cut := sum(columns.get(name, ())):
                warn(f"{cut} of {len(requests)} inputs are longer than {flag} and truncated")
        encoder, llm = self.models.encoder, self.models.llm
        encoder_rows = embedding_rows(load_config(encoder)) if encoder is not None else None
        read = columns | {"target_ids": list((targets or {}).values())}
        check_tokens(self.tokenizers, read, (encoder, encoder_rows), (llm, embedding_rows(llm_config(llm)[0])))
        longest = max(input_positions(columns, self.bridge)) + new_tokens
        check_positions(llm, longest, "the longest input with its answer", "max_gen_len, max_seq_len or the few-shots")
        if encoder is not None:
            longest = max(map(len, columns["encoder_ids"]))
            check_positions(encoder, longest, "the longest text of the encoder", "max_seq_len")
        return columns

    def _query(self, request: Instance) -> Query:
        return find_query(request.task_name, self.query, required=self.reads_rows)

    def _example(self, number: int, request: Instance) -> Example:
        query, language = self._query(request), "English"  # on which nothing depends but an encoder's tag
        if hasattr(self.tokenizers.encoder, "src_lang"):
            named = self.language or query.language
            if named is None:
                raise UserError(
                    f"encoder {self.models.encoder} reads a language tag, and the language of task {request.task_name} "
                    "is not known: pass language=CODE among the model arguments"
                )
            language = find_language(named).name
        source = source_text(query, request.task_name, request.doc) if self.reads_rows else ""
        return Example(str(number), language, source, request.args[0], "")

    def _continuation_ids(self, request: Instance) -> list[int]:
        text = request.args[1]
        # A SentencePiece tokenizer begins every text with a blank: the harness's own would be a second one.
        if text.startswith(" ") and self._blank_is_added:
            text = text[1:]
        ids = self.tokenizers.llm(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"task {request.task_name} asks for the probability of an empty text")
        return [*ids, self.tokenizers.eos_id] if self._query(request).end_token else ids

    @cached_property
    def _blank_is_added(self) -> bool:
        tokenizer = self.tokenizers.llm
        return tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0][0] == "▁"

    def _explained(self, batch: list[int]):
        return explain_out_of_memory(f"on a batch of {len(batch)} examples", {}, "lower --batch_size or max_seq_len")


class StopAtText(StoppingCriteria):
    """Ends rows whose answer holds a stop string; `ends` has their number of tokens then, None for the others."""

    def __init__(self, tokenizer, until: Sequence[str], rows: int):
        self.tokenizer, self.until = tokenizer, until
        self.ends: list[int | None] = [None] * rows
        # A token has a byte at least: so many hold the longest string, whatever its last token brings besides.
        self.window = max((len(one.encode()) for one in until), default=0) + 8

    def __call__(self, input_ids, scores, **options):
        tails = self.tokenizer.batch_decode(input_ids[:, -self.window :])
        for row, tail in enumerate(tails):
            if self.ends[row] is None and any(one in tail for one in self.until):
                self.ends[row] = input_ids.shape[1]
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)


def choose_device(name: str | None) -> torch.device:
    """Returns the device that is asked for; the CPU where it is the harness's default and there is no GPU.

    Raises:
        UserError: for another one that torch does not know or that is not there.
    """
    if name in (None, "cuda:0", "cuda") and not torch.cuda.is_available():
        warn("no GPU is there: --device cpu")
        return torch.device("cpu")
    try:
        device = torch.device(name or "cuda:0")
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device: pass cpu or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs; pass cpu or one of them")
    return device


def read_flags(given: dict) -> Namespace:
    """Returns model arguments as run_evaluation.py reads its flags.

    Raises:
        UserError: for an unknown one, a value that it cannot have, and no model to evaluate.
    """
    given = {"init_checkpoint" if name == "pretrained" else name: value for name, value in given.items()}
    argv = []
    for name, value in given.items():
        if name not in FLAGS:
            known = (*OWN, *FLAGS)
            raise UserError(f"model argument {name} is unknown{nearest(name, known)}: choose from {', '.join(known)}")
        if name == "llm_only" and isinstance(value, bool):
            argv += ["--llm_only"] * value
        else:
            argv += [f"--{name}={one}" for one in (value if isinstance(value, list) else [value])]
    args = build_parser().parse_args(argv)
    if args.init_checkpoint is None and not (args.llm_only and args.llm_path):
        raise UserError("no model named: pass init_checkpoint=FOLDER, or llm_only=True,llm_path=FOLDER")
    return args


def read_generation(request: Instance, limit: int) -> tuple[tuple[str, ...], int]:
    """Returns a request's stop strings and most new tokens.

    Args:
        limit: where the task names none.

    Raises:
        UserError: for anything but greedy decoding.
    """
    options = normalize_gen_kwargs(request.args[1], limit)
    until, limit, sampling = options.pop("until"), options.pop("max_gen_toks"), options["do_sample"]
    if sampling or options.keys() - IGNORED:
        what = "sampling" if sampling else ", ".join(sorted(options.keys() - IGNORED))
        raise UserError(f"task {request.task_name} asks for {what}, but the mindmerger model decodes greedily alone")
    return tuple(one for one in until if one), limit
