"""Continuous batching: rows that have ended give their places to waiting ones, and no answer changes."""

import pytest
import torch
from test_modeling_mindmerger import LLMS, make_pair

from mindmerger.data.batches import collate
from mindmerger.generation import answers, continuous
from mindmerger.generation.answers import answer, generate_in_places, rows_change_places, split_evaluation
from mindmerger.model.decoding import packed_weights
from mindmerger.model.mindmerger import MindMerger
from mindmerger.model.towers import ModelError

END_TOKENS = list(range(2, 20))  # a sixth of the vocabulary, so that answers end after 1 to 20 tokens


class Questions:
    """Rows of random ids, of 4 to 22 positions, with the arguments that `generate_rows` asks for."""

    def __init__(self, number=23, seed=1):
        draw = torch.Generator().manual_seed(seed)

        def ids(least, most):
            size = int(torch.randint(least, most, (1,), generator=draw))
            return torch.randint(20, 100, (size,), generator=draw).tolist()

        self.rows = [{"encoder_ids": ids(2, 14), "prompt_ids": ids(1, 8)} for _ in range(number)]
        self.lengths = [2 + len(row["encoder_ids"]) + len(row["prompt_ids"]) for row in self.rows]
        self.order = sorted(range(number), key=lambda i: (-self.lengths[i], i))

    def read(self, part):
        return collate([self.rows[i] for i in part], 0, 0).tensors

    def alone(self, model, new_tokens):
        """The answers as `generate` gives them one by one, up to the end token."""
        found = {}
        for i in self.order:
            ids = model.generate(**self.read([i]), max_new_tokens=new_tokens)[0].tolist()
            end = next((k for k, token in enumerate(ids) if token in model.eos_token_ids), len(ids))
            found[i] = ids[: end + 1]
        return found


def with_ends(model):
    model.eos_token_ids = model.llm.generation_config.eos_token_id = END_TOKENS
    return model


@pytest.mark.parametrize("llm", LLMS)
def test_answers_are_those_of_each_row_alone_however_many_places_there_are(tmp_path, llm, monkeypatch):
    """Sliding windows of 8, learned positions, shared heads; keys and values are moved every 1, 5, 32 tokens."""
    model, questions = with_ends(make_pair(tmp_path, "mt5", llm)), Questions()
    assert continuous.can_run(model)
    expected = questions.alone(model, 20)
    assert len({len(ids) for ids in expected.values()}) > 1
    for places, room in ((1, 1), (3, 1), (7, 5), (40, 32)):
        monkeypatch.setattr(continuous, "ROOM", room)
        ended = []
        found = continuous.generate_rows(
            model, questions.order, questions.lengths, questions.read, lambda longest, n=places: n, 20, ended.append
        )
        assert found == expected
        assert sum(ended) == len(questions.rows)


def test_a_waiting_row_takes_the_place_of_an_ended_one_while_others_run_on(tmp_path, monkeypatch):
    """Else it would be batches one after the other: nothing in the answers would show it."""
    model, questions = with_ends(make_pair(tmp_path, "mt5", "llama")), Questions()
    admitted, admit = [], continuous.Rows.admit

    def noted(rows, numbers, inputs):
        admitted.append((len(rows.running), len(numbers)))
        admit(rows, numbers, inputs)

    monkeypatch.setattr(continuous.Rows, "admit", noted)
    steps, step = [], continuous.Rows.step
    monkeypatch.setattr(continuous.Rows, "step", lambda rows: (steps.append(len(rows.numbers)), step(rows)))
    continuous.generate_rows(model, questions.order, questions.lengths, questions.read, lambda longest: 6, 20)
    assert sum(running > 0 for running, _ in admitted) >= 2
    assert all(running + new <= 6 for running, new in admitted)
    assert sum(new for _, new in admitted) == len(questions.rows)
    batches = [questions.order[i : i + 6] for i in range(0, 23, 6)]
    lengths = questions.alone(model, 20)
    assert sum(steps) < sum(6 * (max(len(lengths[i]) for i in batch) - 1) for batch in batches)


def test_inputs_are_read_only_when_an_eighth_of_the_places_is_free(tmp_path, monkeypatch):
    """One row at a time would read all weights for it."""
    model, questions = with_ends(make_pair(tmp_path, "mt5", "llama")), Questions(number=80)
    admitted, admit = [], continuous.Rows.admit

    def noted(rows, numbers, inputs):
        admitted.append(rows.free)
        admit(rows, numbers, inputs)

    monkeypatch.setattr(continuous.Rows, "admit", noted)
    continuous.generate_rows(model, questions.order, questions.lengths, questions.read, lambda longest: 32, 20)
    assert len(admitted) > 2 and min(admitted) >= 4


def test_places_follow_the_inputs_left_and_are_closed_up_at_the_end(tmp_path, monkeypatch):
    """No answer ends early: all rows end together, and of the shorter inputs that follow more fit."""
    model, questions = make_pair(tmp_path, "mt5", "llama"), Questions()
    model.eos_token_ids = [-2]
    sizes, rows = [], continuous.Rows
    monkeypatch.setattr(continuous, "Rows", lambda *a: (sizes.append(a[1]), rows(*a))[1])
    continuous.generate_rows(
        model, questions.order, questions.lengths, questions.read, lambda longest: 120 // (longest + 4), 4
    )
    assert sizes[0] == 120 // (max(questions.lengths) + 4) and sizes[0] < sizes[1]
    with_ends(model)
    widths, step = [], rows.step
    monkeypatch.setattr(rows, "step", lambda one: (widths.append(len(one.mask_BC)), step(one))[1])
    continuous.generate_rows(model, questions.order, questions.lengths, questions.read, lambda longest: 23, 20)
    assert widths[0] == 23 and widths[-1] <= 12


def test_inputs_are_read_in_parts_of_limited_size(tmp_path, monkeypatch):
    model, questions = make_pair(tmp_path, "mt5", "llama"), Questions()
    monkeypatch.setattr(continuous, "READ_POSITIONS", 50)
    parts = []
    read = lambda part: (parts.append(part), questions.read(part))[1]  # noqa: E731
    continuous.generate_rows(model, questions.order, questions.lengths, read, lambda longest: 23, 2)
    assert [i for part in parts for i in part] == questions.order
    assert all(len(part) * questions.lengths[part[0]] <= 50 for part in parts)


def test_logits_that_are_not_numbers_end_it_by_name_also_after_others_have_ended(tmp_path):
    model, questions = with_ends(make_pair(tmp_path, "mt5", "llama")), Questions()
    calls = []

    def spoil(module, given, output):
        calls.append(1)
        if len(calls) == 6:
            output[0] = torch.nan
        return output

    handle = model.llm.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(ModelError, match="NaN or infinite although all weights are finite"):
        continuous.generate_rows(model, questions.order, questions.lengths, questions.read, lambda longest: 23, 20)
    handle.remove()


def test_garbage_in_the_place_of_an_ended_row_harms_nobody(tmp_path):
    """Ended rows are computed along: their logits are looked at by nobody, and their positions do not run on beyond
    the 64 that GPT-2 has learned here."""
    model, questions = with_ends(make_pair(tmp_path, "mt5", "gpt2")), Questions(number=2)
    rows = continuous.Rows(model, 2, 30)
    with torch.no_grad():
        rows.admit(questions.order, questions.read(questions.order))
        rows.numbers[1] = None
        before = rows.positions_B.clone()
        for _ in range(5):
            rows.step()
    assert rows.positions_B.tolist() == [before[0] + 5, before[1]]


@pytest.mark.parametrize("llm", ["llama", "qwen3", "gpt2", "opt"])
def test_what_all_inputs_of_the_llm_alone_begin_with_is_read_once(tmp_path, llm, monkeypatch):
    """The shared part lies before a row's padding while the row is read, and behind it while it is decoded."""
    model, questions = with_ends(make_pair(tmp_path, "mt5", llm)), Questions()
    start = [30, 40, 50, 60, 70, 80, 90]
    for i, row in enumerate(questions.rows):
        questions.rows[i] = {"prompt_ids": start + row["prompt_ids"] + row["encoder_ids"]}
    questions.lengths = [1 + len(row["prompt_ids"]) for row in questions.rows]
    questions.order = sorted(range(23), key=lambda i: (-questions.lengths[i], i))
    shared = answers.shared_positions(model, {"prompt_ids": [row["prompt_ids"] for row in questions.rows]})
    assert shared == (model.bos_token_id is not None) + len(start)
    expected = questions.alone(model, 20)
    widths, forward = [], type(model.llm).forward

    def noted(llm, *args, **inputs):
        if inputs.get("inputs_embeds") is not None:
            widths.append(inputs["inputs_embeds"].shape[1])
        return forward(llm, *args, **inputs)

    for places in (3, 40):
        widths.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(model.llm), "forward", noted)
            given = questions.order, questions.lengths, questions.read, lambda longest, n=places: n, 20
            assert continuous.generate_rows(model, *given, shared=shared) == expected
        longest = max(questions.lengths) - (model.bos_token_id is None)
        assert widths[0] == shared and widths[1] == longest - shared and max(widths[2:], default=0) <= widths[1]


def test_what_is_shared_leaves_each_input_something_and_no_sliding_window_a_gap(tmp_path):
    model = make_pair(tmp_path / "llama", "mt5", "llama")
    bos = int(model.bos_token_id is not None)
    for prompts, alike in (([[5, 6, 7], [5, 6]], 1), ([[5], [6]], 0), ([[5, 6, 7, 8], [5, 6, 9, 8], [5, 6, 7, 9]], 2)):
        assert answers.shared_positions(model, {"prompt_ids": prompts}) == bos + alike
    assert answers.shared_positions(model, {"prompt_ids": [[5, 6], [5, 7]], "encoder_ids": [[1], [2]]}) == 0
    sliding = make_pair(tmp_path / "mistral", "mt5", "mistral")
    assert answers.shared_positions(sliding, {"prompt_ids": [[5, 6], [5, 7]]}) == 0


@pytest.mark.parametrize("kind", ["bloom", "mamba", "memory"])
def test_llms_whose_rows_cannot_change_places_are_left_to_generate(tmp_path, kind, tiny_encoder, tiny_llm):
    """BLOOM counts its positions itself, Mamba keeps a state that is no list of tokens, a bridge's memory is made for
    a batch."""
    small = {"vocab_size": 120, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "memory":
        model = MindMerger.from_models(tiny_encoder, tiny_llm, bridge="layalign")
    else:
        from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

        made = {
            "bloom": lambda: BloomForCausalLM(BloomConfig(**small, n_layer=2, n_head=4)),
            "mamba": lambda: MambaForCausalLM(MambaConfig(**small, num_hidden_layers=2, state_size=4)),
        }[kind]()
        model = make_pair(tmp_path, "mt5", "llama")
        model.llm = made
    assert not continuous.can_run(model)


def test_answer_gives_the_same_with_places_and_with_batches(tiny_encoder, tiny_llm, monkeypatch):
    model = MindMerger.from_models(tiny_encoder, tiny_llm)
    texts = ["one", "a much longer question than the others are", "two and three", "four", "five six"]
    used = []
    real = answers.generate_in_places
    monkeypatch.setattr(answers, "generate_in_places", lambda *a: (used.append(1), real(*a))[1])
    found = answer(model, texts, batch_size=2, max_new_tokens=12)
    assert used
    monkeypatch.setattr(continuous, "can_run", lambda model: False)
    assert answer(model, texts, batch_size=2, max_new_tokens=12) == found
    assert len(used) == 1


def test_running_out_of_memory_names_sizes_and_flags(tiny_encoder, tiny_llm, monkeypatch):
    from mindmerger.runtime.errors import UserError

    def full(*args, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(continuous, "generate_rows", full)
    with pytest.raises(UserError, match=r"on 2 examples at once, longest input 9, answer 7 tokens: lower --eval_max"):
        generate_in_places(None, None, {"encoder_ids": []}, [0, 1, 2], [9, 5, 4], lambda longest: 2, 7)


@pytest.mark.parametrize(
    "changed", [{"token_budget": None}, {"batch_size": 4}, {"engine": "vllm"}, {"label_ids": {}}, {}], ids=str
)
def test_rows_change_places_with_a_token_budget_alone(tmp_path, changed):
    from types import SimpleNamespace

    model = make_pair(tmp_path, "mt5", "llama")
    asked = {"token_budget": 100, "batch_size": None, "engine": "hf", "label_ids": None} | changed
    columns = {"prompt_ids": [[1] * n for n in range(1, 31)]}
    settings = SimpleNamespace(**asked, columns=columns, bridge=None, max_new_tokens=10)
    assert rows_change_places(model, settings) is (not changed)
    batches, plain = split_evaluation(list(range(30)), settings, model), split_evaluation(list(range(30)), settings)
    if changed:
        assert batches == plain
    else:
        assert [i for batch in batches for i in batch] == [i for batch in plain for i in batch]
        assert len(batches) == -(-len(plain) // 4)
        # What a kill leaves are the same batches.
        left = [i for batch in batches[:1] + batches[2:] for i in batch]
        assert split_evaluation(left, settings, model) == batches[:1] + batches[2:]


def test_packed_weights_change_no_bit_and_are_gone_afterwards(tiny_encoder, tiny_llm):
    """On processors without bf16 instructions nothing is packed, and the same holds."""
    model = MindMerger.from_models(tiny_encoder, tiny_llm, torch.bfloat16)
    inputs = torch.randint(20, 100, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.llm(inputs).logits
        with packed_weights(model.llm):
            packed = ["forward" in vars(layer) for layer in model.llm.modules() if type(layer) is torch.nn.Linear]
            assert torch.equal(model.llm(inputs).logits, before)
    assert all(packed) is bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert not any("forward" in vars(layer) for layer in model.llm.modules())


def test_weights_that_would_need_much_memory_twice_are_not_packed(tiny_encoder, tiny_llm, monkeypatch):
    monkeypatch.setattr("mindmerger.model.decoding.MOST_PACKED", 10)
    for dtype in (torch.bfloat16, torch.float32):
        model = MindMerger.from_models(tiny_encoder, tiny_llm, dtype)
        with packed_weights(model.llm):
            assert not any("forward" in vars(layer) for layer in model.llm.modules())
