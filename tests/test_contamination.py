"""The contamination check: golden values on planted items, languages without blanks, streams, accuracies."""

import json
import tracemalloc

import pytest

from mindmerger.analysis import contamination as analysis_contamination
from mindmerger.analysis.contamination import (
    TestIndex,
    build_table,
    check,
    look_up_files,
    main,
    normalise,
    stream_json_list,
    stream_texts,
)
from mindmerger.runtime.errors import UserError
from mindmerger.tasks import find_task
from mindmerger.tasks.examples import evaluation_examples
from mindmerger.tasks.languages import find_language

# 21 words: 9 n-grams of 13.
ENGLISH = "Anna has twelve red apples and gives five of them to her brother, who eats two. How many are left? Explain"
WORDS = normalise(ENGLISH).split()
assert len(WORDS) == 21
JAPANESE = "花子さんはりんごを十二個持っています。弟に五個あげて、弟は二個食べました。花子さんには何個残っていますか？"


def judged(text, *training, code="en"):
    """(any hit, n-grams hit, n-grams, share, longest) of one test item against training texts."""
    index = TestIndex()
    index.add("item", text, find_language(code))
    for row, one in enumerate(training, 1):
        index.look_up(one, f"train:{row}")
    [item] = index.items
    return any(item.hits), sum(item.hits), len(item.hits), round(item.share, 4), item.longest


# -- golden values


def test_an_item_planted_verbatim_is_wholly_contaminated():
    assert judged(ENGLISH, "Something before. " + ENGLISH + " And after.") == (True, 9, 9, 1.0, 21)


def test_other_punctuation_case_and_width_change_nothing():
    altered = ENGLISH.upper().replace(",", " —").replace("?", "!!!").replace(" red", "\u00a0“red”\n")
    altered = altered.replace("APPLES", "\uff21\uff30\uff30\uff2c\uff25\uff33")
    assert altered != ENGLISH.upper()
    assert judged(ENGLISH, altered) == (True, 9, 9, 1.0, 21)


def test_one_word_changed_in_the_middle_loses_the_ngrams_that_hold_it():
    # Word 15 of 21 ("eats"): the n-grams that start at words 3 to 9 hold it, those at words 1 and 2 do not.
    place = 14
    words = [*WORDS[:place], "changed", *WORDS[place + 1 :]]
    expected = [start for start in range(9) if not start <= place < start + 13]
    assert expected == [0, 1]
    assert judged(ENGLISH, " ".join(words)) == (True, 2, 9, round(2 / 9, 4), 14)


def test_one_word_changed_at_the_end_stays_contaminated():
    assert judged(ENGLISH, " ".join([*WORDS[:-1], "changed"])) == (True, 8, 9, round(8 / 9, 4), 20)


def test_japanese_is_compared_by_characters():
    """As words, a Japanese item is two or three long and nothing would ever be found."""
    letters = normalise(JAPANESE).replace(" ", "")
    number = len(letters) - 30 + 1
    assert number > 10
    planted = "例題です。" + JAPANESE.replace("。", " ").replace("、", "") + "答えは?"
    assert judged(JAPANESE, planted, code="ja") == (True, number, number, 1.0, len(letters))
    changed = JAPANESE.replace("何個", "幾つ")
    # Of the 20 n-grams those that start at characters 0 to 10 end before the change at 40.
    assert judged(JAPANESE, changed, code="ja") == (True, 11, 20, 0.55, 40)


def test_thai_and_chinese_are_compared_by_characters_and_telugu_by_words():
    for code, text in (("th", "ก" * 10 + "ขคงจฉ" * 6), ("zh", "一二三四五六七八九十" * 4)):
        assert judged(text, text, code=code)[0] and judged(text, text, code=code)[2] == len(text) - 29
    telugu = "ఒకటి రెండు మూడు నాలుగు ఐదు ఆరు ఏడు ఎనిమిది తొమ్మిది పది పదకొండు పన్నెండు పదమూడు"
    assert judged(telugu, telugu, code="te") == (True, 1, 1, 1.0, 13)


def test_an_item_shorter_than_one_ngram_needs_a_training_text_that_equals_it():
    short = "What is hot?"
    assert judged(short, "what is HOT") == (True, 1, 1, 1.0, 3)
    assert judged(short, "I ask: what is hot? Tell me.") == (False, 0, 1, 0.0, 0)
    assert judged("一加一等于几？", "一加一等于几", code="zh") == (True, 1, 1, 1.0, 6)
    assert judged("?!", "?!") == (False, 0, 1, 0.0, 0)


def test_ngrams_found_in_different_texts_add_up_but_the_longest_stretch_is_one_text_s():
    first, second = " ".join(WORDS[:14]), " ".join(WORDS[5:])
    assert judged(ENGLISH, first, second) == (True, 2 + 4, 9, round(6 / 9, 4), 16)


def test_the_longest_stretch_is_consecutive_on_both_sides():
    """N-grams that stand apart in the training text are no longer stretch, however they lie in the item."""
    apart = " ".join([*WORDS[:13], "gap", *WORDS[1:14]])
    assert judged(ENGLISH, apart) == (True, 2, 9, round(2 / 9, 4), 13)


# -- items of a task


def test_every_planted_item_of_a_task_is_found_and_no_other(datas, tmp_path):
    """Short questions do not count as hits of one another, and each language's own text is found in its own way."""
    task = find_task("math")
    planted = {}
    for code in ("sw", "ja", "th", "de"):
        planted[code] = evaluation_examples(task, datas, find_language(code))[1]
    rows = [{"lang": "x", "query": "Q: " + example.source + " (end)", "response": "r"} for example in planted.values()]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    languages = [find_language(code) for code in ("sw", "ja", "th", "de", "zh")]
    records, texts = check(task, datas, languages, [tmp_path / "t.json"], ["query"], 0.7)
    assert texts == 4 and len(records) == 5 * 4
    assert {r["id"] for r in records if r["contaminated"]} == {e.id for e in planted.values()}
    found = next(r for r in records if r["id"] == planted["ja"].id)
    assert found["where"] == f"{tmp_path / 't.json'}:2" and found["unit"] == "character" and found["share"] == 1


def test_progress_in_a_log_file_is_whole_lines(tmp_path, capsys):
    """Of hours of reading a log file showed nothing."""
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    assert look_up_files(TestIndex(), [tmp_path / "t.txt"], None) == 2
    error = capsys.readouterr().err
    assert "\r" not in error and "\ntraining text: 100%|" in error, error


def test_translated_training_data_shows_on_the_english_side(datas, tmp_path):
    """A Swahili item is not clean when its English original was trained on."""
    task = find_task("math")
    english = evaluation_examples(task, datas, find_language("en"))[2]
    (tmp_path / "t.txt").write_text(english.source + "\n")
    records, _ = check(task, datas, [find_language("sw"), find_language("en")], [tmp_path / "t.txt"], None, 0.7)
    by_id = {record["id"]: record for record in records}
    assert not by_id["sw-3"]["any_hit"] and by_id["sw-3"]["english"]["contaminated"]
    assert by_id["en-3"]["contaminated"] and by_id["en-3"]["english"] is None
    [swahili, own] = build_table(records, [])
    assert (swahili["contaminated"], swahili["english_contaminated"], swahili["dirty"]) == (0, 1, 1)
    assert (own["contaminated"], own["english_contaminated"], own["dirty"]) == (1, 0, 1)


# -- streams


def test_all_kinds_of_training_files_give_their_texts_and_rows(tmp_path):
    (tmp_path / "a.json").write_text('[{"q": "one", "n": 3, "deep": {"x": ["two"]}},\n {"q": "three", "n": null}]')
    (tmp_path / "a.jsonl").write_text('{"q": "one", "d": {"x": "two"}}\n\n{"q": "three", "d": {"x": "four"}}\n')
    (tmp_path / "a.tsv").write_text("one\ttwo\nthree\tfour\n")
    (tmp_path / "train.sw").write_text("one\ntwo\n")

    def read(name, fields=None):
        return [(text, where.rpartition(":")[2]) for text, where, _ in stream_texts(tmp_path / name, fields)]

    assert read("a.json") == [("one", "1"), ("two", "1"), ("three", "2")]
    assert read("a.json", ["q"]) == [("one", "1"), ("three", "2")]
    assert read("a.jsonl", ["d.x", "q"]) == [("two", "1"), ("one", "1"), ("four", "3"), ("three", "3")]
    assert read("a.tsv") == [("one", "1"), ("two", "1"), ("three", "2"), ("four", "2")]
    assert read("train.sw") == [("one", "1"), ("two", "2")]


def test_elements_cut_by_a_chunk_are_whole_and_memory_stays_flat(tmp_path, monkeypatch):
    """json.load of a training file of gigabytes would not fit; an element must survive every place of the cut."""
    rows = [{"query": f'{i} é漢 \\ " ],' + "x" * (i % 7)} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    for chunk in (1, 2, 7, 100):
        monkeypatch.setattr(analysis_contamination, "_CHUNK", chunk)
        assert [record.value for record, _ in stream_json_list(tmp_path / "a.json")] == rows
    monkeypatch.undo()
    big = tmp_path / "big.json"
    row = json.dumps({"query": "word " * 2000})
    big.write_text("[" + ",\n".join([row] * 1200) + "]")
    assert big.stat().st_size > 12e6
    tracemalloc.start()
    assert sum(1 for _ in stream_json_list(big)) == 1200
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < big.stat().st_size / 2


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("t.json", '{"a": 1}', None, "t.json: expected a JSON list; .*jsonl"),
        ("t.json", '[{"query": "x"}, {"query": ]', "query", "t.json: element 2 is not valid JSON"),
        ("t.json", '[{"query": "x"}', "query", "t.json: element 2 is not valid JSON"),
        ("t.json", '[{"query": "x"}]', "text", "t.json:1: field 'text' is missing"),
        ("t.jsonl", '{"query": "x"}\nnonsense\n', "query", "t.jsonl:2: not valid JSON"),
        ("t.txt", "line\n", "query", "t.txt:1: --fields query .* not a JSON object"),
        ("absent.json", None, None, "no file absent.json"),
    ],
)
def test_faulty_training_files_are_one_line(datas, tmp_path, monkeypatch, name, content, fields, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    flags = ["--train", name, "--data_root", datas, "--languages", "sw", "--output_dir", "out"]
    with pytest.raises(UserError, match=message) as caught:
        main([*flags, *(["--fields", fields] if fields else [])])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_other_wrong_input_is_one_line(datas, tmp_path):
    (tmp_path / "t.txt").write_text("x\n")
    flags = ["--train", str(tmp_path / "t.txt"), "--data_root", datas]
    for more, message in ((["--task", "translation"], "no evaluation set"), (["--results", "no"], "no results folder")):
        with pytest.raises(UserError, match=message):
            main([*flags, *more])
    with pytest.raises(UserError, match="expected a number above 0 and at most 1, got '70'"):
        main([*flags, "--threshold", "70"])


# -- the command


def write_results(folder, datas, code, correct):
    """A finished evaluation's files, as far as they are read here."""
    examples = evaluation_examples(find_task("math"), datas, find_language(code))
    name = find_language(code).name
    rows = [{"id": e.id, "source": e.source, "answer": e.target, "correct": e.id in correct} for e in examples]
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    (folder / f"predictions/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"task": "math_mgsm", "form": "soft", "languages": {name: {"n": len(rows)}}}
    (folder / "results.json").write_text(json.dumps(results))


def test_accuracy_on_all_clean_and_dirty_items(datas, tmp_path, capsys):
    [first, second, *_] = evaluation_examples(find_task("math"), datas, find_language("sw"))
    (tmp_path / "t.txt").write_text(first.source + "\n" + second.source + "\n")
    write_results(tmp_path / "run", datas, "sw", {"sw-1", "sw-4"})
    flags = ["--train", str(tmp_path / "t.txt"), "--data_root", datas, "--languages", "sw"]
    assert main([*flags, "--results", str(tmp_path / "run/"), "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines()[-2:] if line.startswith("Swahili"))
    assert row == ["Swahili", "50.0", "(n", "4)", "50.0", "(n", "2)", "50.0", "(n", "2)"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"math_mgsm.json", "math_mgsm.csv"}
    written = json.loads((tmp_path / "out/math_mgsm.json").read_text())
    assert [item["contaminated"] for item in written["items"]] == [True, True, False, False]
    assert written["settings"]["training_texts"] == 2 and written["languages"][0]["dirty"] == 2
    head, line = (tmp_path / "out/math_mgsm.csv").read_text().splitlines()
    assert dict(zip(head.split(","), line.split(","), strict=True))["contaminated"] == "2"
