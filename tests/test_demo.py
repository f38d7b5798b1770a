"""The demo page: answers that grow, what the command refuses, and the page itself in a real browser."""

import importlib.util
import re
import signal
import socket
import subprocess
import sys
import time

import browser
import psutil
import pytest
import torch
from conftest import ROOT, clean_environment, free_port, make_tiny_llm
from test_translate_test import make_translator

from mindmerger.generation import streaming
from mindmerger.generation.answers import answer
from mindmerger.generation.streaming import stream_answer
from mindmerger.integrations import demo
from mindmerger.model.mindmerger import MindMerger
from mindmerger.runtime.errors import UserError

QUESTION = "จอนมีแอปเปิ้ล 3 ผล ซื้อเพิ่มอีก 4 ผล เขามีกี่ผล"  # three bytes a letter, so that answers hold half ones
LONG = 120  # tokens, long enough to be seen growing


def save(folder, model, stage="augmentation"):
    """A mapping as training leaves it, of any numbers."""
    torch.manual_seed(5)
    torch.nn.init.normal_(next(p for p in model.mapping.parameters() if p.dim() == 2), std=0.5)
    model.config.task, model.config.stage, model.config.augmentation = "math", stage, True
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tiny_encoder, tiny_llm):
    return MindMerger.from_models(tiny_encoder, tiny_llm, torch.float32)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return save(tmp_path_factory.mktemp("demo") / "mapping", model)


def both(checkpoint, *flags):
    """The settings and both models, as the command has them."""
    args = demo.build_parser().parse_args(["--checkpoint", checkpoint, "--precision", "fp32", *flags])
    settings = demo.settle(args, on_gpu=False)
    return settings, demo.load_both(settings, torch.device("cpu"))


def last(answers):
    *_, shown = answers
    return shown


# -- answers that grow


def test_a_streamed_answer_grows_token_by_token_to_what_answer_gives(model, checkpoint):
    shown = list(stream_answer(model, QUESTION, max_new_tokens=LONG))
    assert [shown[-1].output] == answer(model, [QUESTION], max_new_tokens=LONG) and shown[-1].hit_limit
    tokens = [one.generated_tokens for one in shown]
    assert len(set(tokens)) > 10 and tokens == sorted(tokens) and tokens[-1] == LONG
    assert all(shown[-1].output.startswith(one.output) for one in shown)


def test_half_a_character_is_not_shown_before_its_end(model, monkeypatch):
    whole = answer(model, [QUESTION], max_new_tokens=LONG)[0]
    monkeypatch.setattr(streaming.Steps, "latest", lambda self: self._ids.get())  # every step, however fast they come
    shown = [one.output for one in stream_answer(model, QUESTION, max_new_tokens=LONG)]
    assert len(shown) == LONG + 1 and whole.startswith(shown[40])
    assert not any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in shown[:-1])


def test_who_reads_no_further_ends_the_generation(model, monkeypatch):
    lengths, generate = [], MindMerger.generate

    def watched(self, **arguments):
        ids = generate(self, **arguments)
        lengths.append(ids.shape[1])
        return ids

    monkeypatch.setattr(MindMerger, "generate", watched)
    reader = stream_answer(model, QUESTION, max_new_tokens=2000)
    next(reader)
    reader.close()
    assert 0 < lengths[0] < 1000


def test_an_error_while_it_streams_reaches_the_reader(tiny_encoder, tmp_path):
    llm = make_tiny_llm(tmp_path / "llm")
    broken = MindMerger.from_models(tiny_encoder, llm, torch.float32)
    with torch.no_grad():
        broken.llm.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        list(stream_answer(broken, QUESTION, max_new_tokens=4))


def test_a_text_that_the_llm_has_no_positions_for_is_refused_before_it_is_generated(model, monkeypatch):
    from mindmerger.model import towers

    monkeypatch.setattr(towers, "max_positions", lambda config: 100)
    monkeypatch.setattr(towers, "load_config", lambda path: pytest.importorskip("transformers").GPT2Config())
    with pytest.raises(UserError, match="the text with its answer needs .* positions but .* has 100"):
        list(stream_answer(model, QUESTION, max_new_tokens=4))


# -- both sides


def test_both_sides_answer_as_the_package_does_with_tokens_and_seconds(checkpoint, tiny_llm):
    settings, models = both(checkpoint, "--max_new_tokens", "9")
    alone, note, merged, other_note = last(demo.answer_both(models, settings, QUESTION, None))
    separate = MindMerger.from_models(None, tiny_llm, torch.float32)
    assert [alone] == answer(separate, [QUESTION], max_new_tokens=9)
    assert [merged] == answer(models[1], [QUESTION], max_new_tokens=9) != [alone]
    for text in (note, other_note):
        assert re.fullmatch(r"9 tokens in \d+\.\d s, stopped at the limit", text), text
    assert models[0].llm is models[1].llm  # one LLM in memory, not two


def test_the_llm_alone_keeps_its_own_output_head_where_the_bridge_trains_one(tiny_encoder, tiny_llm, tmp_path):
    trained = MindMerger.from_models(
        tiny_encoder, tiny_llm, torch.float32, bridge="langbridge", bridge_options={"train_lm_head": "true"}
    )
    with torch.no_grad():
        trained.mapping.lm_head.weight.neg_()
    trained.config.task = "math"
    trained.save_pretrained(tmp_path / "mapping")
    settings, models = both(str(tmp_path / "mapping"), "--max_new_tokens", "6")
    alone, _, merged, _ = last(demo.answer_both(models, settings, QUESTION, None))
    assert [alone] == answer(MindMerger.from_models(None, tiny_llm, torch.float32), [QUESTION], max_new_tokens=6)
    assert [merged] == answer(trained, [QUESTION], max_new_tokens=6)


def test_of_a_folder_of_stages_the_last_one_and_its_task_are_taken(model, tmp_path):
    for stage in ("mapping", "augmentation"):
        model.config.task, model.config.stage = "xnli", stage
        model.save_pretrained(tmp_path / "xnli" / stage)
    settings, _ = both(str(tmp_path / "xnli"))
    assert settings.task.name == "xnli" and settings.mapping_file.endswith("augmentation/mapping.safetensors")


@pytest.mark.parametrize("question", ["", " \n "])
def test_an_empty_question_is_said_in_one_line(checkpoint, question):
    settings, models = both(checkpoint)
    assert last(demo.answer_both(models, settings, question, None)) == ("", "error: type a question first", "", "")


def test_an_encoder_with_tags_is_told_the_language_that_was_chosen(tiny_llm, tmp_path):
    encoder = make_translator("nllb", tmp_path / "nllb")
    path = save(tmp_path / "mapping", MindMerger.from_models(encoder, tiny_llm, torch.float32))
    settings, models = both(path, "--max_new_tokens", "5")
    texts = {}
    for language in ("Thai", "Swahili", None):
        _, _, texts[language], note = last(demo.answer_both(models, settings, "jina lako", language))
        assert ("reads a language tag" in note) == (language is None)
    assert [texts["Swahili"]] == answer(models[1], ["jina lako"], languages="Swahili", max_new_tokens=5)
    from mindmerger.data.tokenising import languages_of
    from mindmerger.generation.answers import tokenizers_of

    known = languages_of(tokenizers_of(models[1]).encoder)
    assert {"English", "Thai", "Swahili"} <= set(known)


# -- what is refused


def refused(capsys, *flags):
    """What main() says of a mistake."""
    with pytest.raises(UserError) as caught:
        demo.main([str(flag) for flag in flags])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install ".[demo]"' in refused(capsys, "--checkpoint", checkpoint)


def test_wrong_inputs_are_one_line_before_a_model_loads(monkeypatch, capsys, checkpoint, tiny_llm, tmp_path):
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    monkeypatch.setattr(demo, "load_both", lambda *_: pytest.fail("a model was loaded"))
    assert "--checkpoint" in refused(capsys)
    assert "no mapping at" in refused(capsys, "--checkpoint", tmp_path / "absent")
    assert "math_mgsm" in refused(capsys, "--checkpoint", checkpoint, "--task", "maths_mgsm")
    assert "shape" in refused(capsys, "--checkpoint", checkpoint, "--llm_path", make_tiny_llm(tmp_path / "w", width=64))
    for port in ("0", "65536", "x"):
        assert "--port" in refused(capsys, "--checkpoint", checkpoint, "--port", port)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused(capsys, "--checkpoint", checkpoint, "--port", port)
    assert "--host" in refused(capsys, "--checkpoint", checkpoint, "--host", "nowhere.invalid")


def test_an_adapter_without_a_mapping_has_nothing_to_stand_beside_the_llm(monkeypatch, capsys, tiny_llm, tmp_path):
    MindMerger.from_models(None, tiny_llm, torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(demo, "import_gradio", lambda: None)
    assert "without a mapping" in refused(capsys, "--checkpoint", tmp_path)


# -- the page


@pytest.fixture(scope="module")
def needs_page():
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('gradio is not installed (pip install ".[demo]")')


@pytest.fixture(scope="module")
def served(needs_page, checkpoint, tmp_path_factory):
    """The command, started as a user does, and its address; it must end by Ctrl-C."""
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "mindmerger.integrations.demo", "--checkpoint", checkpoint, "--precision", "fp32"]
    command += ["--max_new_tokens", str(LONG), "--port", str(port)]
    # What would send the page into the world is in the environment, and must not be followed.
    wishes = {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "True"}
    environment = clean_environment(folder) | wishes
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment |= {"HTTPS_PROXY": address, "HTTP_PROXY": address, "NO_PROXY": "127.0.0.1,localhost"}
        with open(folder / "stderr.txt", "w+b") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            url, end = f"http://127.0.0.1:{port}/", time.monotonic() + 120
            while f"the page is at {url}" not in (folder / "stderr.txt").read_text():
                assert process.poll() is None and time.monotonic() < end, (folder / "stderr.txt").read_text()
                time.sleep(0.2)
            yield process, url
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        proxy.settimeout(0.5)
        with pytest.raises(TimeoutError):  # nobody was asked for anything
            proxy.accept()
    assert "Traceback" not in (folder / "stderr.txt").read_text()


@pytest.mark.slow
def test_the_page_is_served_to_this_computer_alone_whatever_the_environment_asks(served):
    process, url = served
    listening = [one for one in psutil.Process(process.pid).net_connections() if one.status == psutil.CONN_LISTEN]
    assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
    assert str(next(iter(listening)).laddr.port) in url


@pytest.fixture(scope="module")
def window(served, tmp_path_factory):
    if (reason := browser.missing()) is not None:
        pytest.skip(reason)
    with browser.browser(tmp_path_factory.mktemp("browser")) as one:
        one.open(served[1])
        yield one


# Keeps every text that an answer has had: polling from outside could miss the growth.
RECORD = """
window.texts = [[], []];
setInterval(() => [0, 1].forEach(i => {
    const text = document.querySelector(`#answer${i} textarea`).value, all = window.texts[i];
    if (all[all.length - 1] !== text) all.push(text);
}), 5);
"""
NOTE = "return [0, 1].map(i => document.querySelector(`#note${i}`)?.innerText.trim() ?? '')"


@pytest.mark.slow
def test_a_question_typed_into_the_page_is_answered_on_both_sides_while_one_looks(window, served, model, tiny_llm):
    window.type("#question textarea", QUESTION)
    window.run(RECORD)
    window.click("#ask")
    window.wait(f"return ({NOTE[7:]}).every(note => note.includes('stopped at the limit'))", seconds=60)
    notes = window.run(NOTE)
    assert all(re.fullmatch(rf"{LONG} tokens in \d+\.\d s, stopped at the limit", note) for note in notes), notes
    shown = [window.run(f"return document.querySelector('#answer{i} textarea').value") for i in (0, 1)]
    alone = MindMerger.from_models(None, tiny_llm, torch.float32)
    wanted = [answer(one, [QUESTION], max_new_tokens=LONG)[0] for one in (alone, model)]
    assert [text.split() for text in shown] == [text.split() for text in wanted]  # a page has line ends of its own
    texts = window.run("return window.texts")
    assert all(len(side) > 4 and len(side[2]) < len(side[-1]) for side in texts), texts
    assert not window.run("return document.querySelector('#language') !== null")  # the tiny mT5 reads no tag


@pytest.mark.slow
def test_the_page_asks_for_nothing_from_elsewhere(window, served):
    asked = window.requested()
    window.open(served[1])
    window.element("#ask")
    asked += window.requested()
    assert len(asked) > 10
    assert {url for url in asked if not url.startswith((served[1], "data:", "blob:", "chrome://"))} == set()


@pytest.mark.slow
def test_stop_ends_both_answers_and_the_next_question_is_answered(window):
    window.type("#question textarea", QUESTION)
    window.run(RECORD)
    # By the page itself, as soon as there is something to stop.
    window.run("""window.stopping = setInterval(() => {
        if (window.texts[0].some(text => text)) { document.querySelector('#stop').click(); clearInterval(stopping); }
    }, 5);""")
    window.click("#ask")
    window.wait("return window.texts[0].some(text => text)")
    time.sleep(1)
    notes = window.run(NOTE)
    time.sleep(2)  # dozens of tokens, however slow the machine
    assert window.run(NOTE) == notes and not notes[1] and int(notes[0].split()[0]) < LONG
    window.click("#ask")
    window.wait(f"return ({NOTE[7:]}).every(note => note.includes('stopped at the limit'))", seconds=60)


@pytest.mark.slow
def test_a_mistake_is_said_on_the_page(window):
    window.type("#question textarea", " ")
    window.click("#ask")
    window.wait(f"return ({NOTE[7:]})[0] === 'error: type a question first'")
