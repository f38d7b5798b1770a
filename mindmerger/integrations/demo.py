"""A page in the browser: a question in any language, answered by the LLM alone and by MindMerger beside it.

    python -m mindmerger.integrations.demo --checkpoint outputs/MindMerger/math/augmentation

Both answers are greedy. They are written one after the other, so that each has the device to itself and their seconds
compare. The page is served to this computer alone unless --host or --share says otherwise, and loads nothing from
elsewhere. It needs the package gradio: pip install ".[demo]".
"""

import argparse
import importlib.util
import os
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

from mindmerger.runtime.chat_template import add_argument as add_chat_template
from mindmerger.runtime.command import CommandParser, at_least, parse_bool, run_main
from mindmerger.runtime.errors import UserError, one_line
from mindmerger.runtime.files import model_path
from mindmerger.runtime.precision import add_argument as add_precision
from mindmerger.runtime.precision import add_quantization, settle_precision
from mindmerger.runtime.processes import log

SIDES = ("LLM alone", "MindMerger")
LOCALHOST = "127.0.0.1"


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    parser = CommandParser(prog="python -m mindmerger.integrations.demo", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=model_path,
        required=True,
        dest="init_checkpoint",
        help="the mapping: a saved folder, a .safetensors file, a released pytorch_model.bin, a hub id, or a folder of "
        "several stages, of which the bridge's last one that is there counts",
    )
    parser.add_argument("--llm_path", type=model_path, help="the LLM (default: what the mapping's config.json names)")
    parser.add_argument("--mt_path", type=model_path, help="the encoder (default: as for --llm_path)")
    parser.add_argument("--bridge", help="the mapping's bridge (default: as for --llm_path, else mindmerger)")
    parser.add_argument(
        "--task", help="task whose prompt is put around the question (default: as for --llm_path, else math)"
    )
    parser.add_argument(
        "--augmentation",
        type=parse_bool,
        help="True: Soft, mapped question and prompt; False: Hard, mapped question only (default: as the bridge's last "
        "stage is trained)",
    )
    parser.add_argument("--max_new_tokens", type=at_least(1), help="most tokens of an answer (default: the task's)")
    add_chat_template(parser.add_argument, "as trained, by the mapping's config.json, else ")
    add_precision(parser.add_argument)
    add_quantization(parser.add_argument)
    parser.add_argument("--host", default=LOCALHOST, help=f"address to listen on (default {LOCALHOST}, this computer)")
    parser.add_argument(
        "--port", type=at_least(1, below=2**16), help="port to listen on (default: the first free one from 7860 on)"
    )
    parser.add_argument("--share", action="store_true", help="also open a public link through Gradio's server")
    # What an evaluation asks for besides, as its flags have it by default.
    parser.set_defaults(llm_only=False, adapter_path=None, bridge_option=[])
    return parser


def import_gradio():
    """Imports gradio with its telemetry off.

    Raises:
        UserError: when it is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError('the demo page needs the package gradio: pip install ".[demo]"')
    # Before the import, which reads it: else every start would be reported, and a version asked for.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    return gradio


def settle(args: argparse.Namespace, on_gpu: bool) -> SimpleNamespace:
    """Finds the models and checks that they fit each other, before a weight is read.

    Raises:
        UserError: for the first thing that does not.
    """
    from mindmerger.data.tokenising import load_tokenizers
    from mindmerger.evaluation.models import (
        DEFAULT_BRIDGE,
        check_adapter_fits,
        check_models_fit,
        choose_chat_template,
        find_models,
        last_stage,
        warn_of_other_precision,
        warn_of_other_quantization,
        warn_of_other_training,
    )
    from mindmerger.model.mapping_files import form_of, read_config
    from mindmerger.model.sharing import fetch_mapping
    from mindmerger.tasks import find_task

    args.init_checkpoint = fetch_mapping(args.init_checkpoint)
    args.init_checkpoint = last_stage(args.init_checkpoint, args.bridge or DEFAULT_BRIDGE) or args.init_checkpoint
    recorded = read_config(args.init_checkpoint)
    if recorded is not None and recorded.mt_path is None:
        raise UserError(f"{args.init_checkpoint} holds an adapter without a mapping: pass a folder with a mapping")
    task = find_task(args.task or (recorded and recorded.task) or "math")
    models = find_models(args, task)
    precision = settle_precision(args.precision, on_gpu)
    form = form_of(models.config, args.augmentation)
    warn_of_other_training(models.config, task, form)
    warn_of_other_precision(models.config, precision)
    warn_of_other_quantization(models.config, args.quantization)
    bridge = check_models_fit(models, quantization=args.quantization)
    chat = choose_chat_template(args, models, form)
    return SimpleNamespace(
        task=task,
        config=models.config,
        augmentation=args.augmentation,
        chat_template=args.chat_template,
        max_new_tokens=args.max_new_tokens or task.max_new_tokens,
        # From here on as `load_model` reads them.
        mt_path=models.encoder,
        llm_path=models.llm,
        tokenizers=load_tokenizers(models.encoder, models.llm, chat),
        bridge_name=models.config.bridge,
        bridge=bridge,
        mapping_file=models.mapping_file,
        adapter=check_adapter_fits(models, "hf"),
        precision=precision,
        quantization=args.quantization,
        attn_implementation=None,
        engine="hf",
        probe_prefix=None,
    )


def load_both(settings: SimpleNamespace, device) -> tuple:
    """Loads the LLM alone and MindMerger, which share one LLM where the bridge leaves it as it is.

    Raises:
        UserError: out of memory, or for a model that cannot be loaded.
    """
    from mindmerger.generation.loading import load_model
    from mindmerger.model.mindmerger import MindMerger

    model = load_model(settings, device)
    if model.adapter is None and not hasattr(model.mapping, "lm_head"):
        alone = MindMerger.from_towers(None, model.llm, None, settings.llm_path)
    else:  # a second LLM, without what is trained in the first: twice the memory
        nothing = {"mt_path": None, "bridge": None, "mapping_file": None, "adapter": None}
        alone = load_model(SimpleNamespace(**vars(settings) | nothing), device)
    # What the encoder reads, and the form of the prompt, which is that of both sides.
    for one in (alone, model):
        for name in ("stage", "augmentation", "chat_template"):
            setattr(one.config, name, getattr(settings.config, name))
    return alone, model


def answer_both(models: tuple, settings: SimpleNamespace, question: str, language: str | None) -> Iterator[tuple]:
    """Yields what the page shows while both answers are written: text and note of either side.

    A mistake in the question is said in the note of the side that met it.
    """
    from mindmerger.generation.streaming import stream_answer

    shown = ["", ""] * len(models)
    yield tuple(shown)
    for i, model in enumerate(models):
        started = time.perf_counter()
        try:
            if not question.strip():
                raise UserError("type a question first")
            ask = settings.task.name, language, settings.max_new_tokens, settings.augmentation, settings.chat_template
            for one in stream_answer(model, question, *ask):
                tokens = f"{one.generated_tokens} token{'s' * (one.generated_tokens != 1)}"
                shown[2 * i : 2 * i + 2] = one.output, f"{tokens} in {time.perf_counter() - started:.1f} s"
                yield tuple(shown)
        except UserError as error:
            shown[2 * i + 1] = f"error: {one_line(error)}"
            yield tuple(shown)
            return
        if one.hit_limit:
            shown[2 * i + 1] += ", stopped at the limit"
            yield tuple(shown)


def build_page(gradio, models: tuple, settings: SimpleNamespace, languages: list[str] | None):
    """Builds the page.

    Args:
        languages: to choose the question's from, None where the encoder reads no tag.
    """

    def ask(question: str, language: str | None):
        yield from answer_both(models, settings, question, language)

    with gradio.Blocks(title="MindMerger", analytics_enabled=False) as page:
        gradio.Markdown("# MindMerger\n" + describe(settings))
        question = gradio.Textbox(label="Question, in any language", lines=3, autofocus=True, elem_id="question")
        tag = gradio.Dropdown(
            languages or [], label="Language of the question", visible=languages is not None, elem_id="language"
        )
        with gradio.Row():
            asking = gradio.Button("Ask", variant="primary", elem_id="ask")
            stop = gradio.Button("Stop", elem_id="stop")
        shown = []
        with gradio.Row():
            for i, side in enumerate(SIDES):
                with gradio.Column():
                    shown.append(gradio.Textbox(label=side, lines=4, interactive=False, elem_id=f"answer{i}"))
                    shown.append(gradio.Markdown(elem_id=f"note{i}"))
        # One at a time, whoever asks: the models are there once.
        asked = gradio.on([asking.click, question.submit], ask, [question, tag], shown, concurrency_limit=1)
        stop.click(None, cancels=[asked])
    return page


def describe(settings: SimpleNamespace) -> str:
    """Returns what answers on the page, in Markdown."""
    names = {"LLM": settings.llm_path, "encoder": settings.mt_path, "mapping": settings.mapping_file}
    return ", ".join(f"{what} `{name}`" for what, name in names.items()) + f", prompt of task `{settings.task.name}`"


def check_address(host: str, port: int | None) -> None:
    """Makes sure that the page can be served at an address.

    Raises:
        UserError: when it cannot.
    """
    try:
        with socket.create_server((host, port or 0)):
            pass
    except OSError as error:
        at = host if port is None else f"{host}:{port}"
        raise UserError(f"cannot serve the page at {at}: {one_line(error)}; choose another --host or --port") from error


def serve(gradio, page, args: argparse.Namespace) -> None:
    """Serves the page until the process is interrupted."""
    # Fonts of the reader's own: no style sheet, whatever a version's default theme is, asks anybody for one.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, url, shared = page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,  # False, not None: the environment cannot switch it on
        prevent_thread_lock=True,
        quiet=True,
        theme=theme,
        footer_links=["gradio"],
    )
    log(f"the page is at {url}" + (f" and {shared}" if shared else "") + "; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        page.close()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = build_parser().parse_args(argv)
    gradio = import_gradio()
    check_address(args.host, args.port)
    import torch

    from mindmerger.data.tokenising import languages_of
    from mindmerger.generation.answers import answer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = settle(args, device.type == "cuda")
    models = load_both(settings, device)
    languages = languages_of(settings.tokenizers.encoder)
    # Once before anyone looks: models that cannot answer end the command, and no question pays for the first start.
    for model in models:
        form = {"augmentation": settings.augmentation, "chat_template": settings.chat_template}
        answer(model, ["1"], settings.task.name, languages and "English", max_new_tokens=1, **form)
    serve(gradio, build_page(gradio, models, settings, languages), args)
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
