"""Tests tasks: names, local files in both layouts, prompts and metrics."""

import csv

import datasets
import numpy as np
import pytest
import sacrebleu

from eval.harness import quiet_harness
from eval.results import Metric, TaskResult, averages, table
from eval.run import _manager
from eval.tasks.build import TaskSettings, build_task
from eval.tasks.local_data import MissingDataError, local_folder, open_local
from eval.tasks.measures import Correlation, TranslationScore, bootstrap_standard_error
from eval.tasks.names import GLUE, Wanted, expand


@pytest.fixture(scope="module")
def manager():
    return _manager(["glue"])


def build(name, manager, data, **settings):
    with quiet_harness():
        return build_task(name, TaskSettings(data=data, **settings), manager)["tasks"][name]


def test_names_are_resolved_without_duplicates():
    names = [wanted.name for wanted in expand(["glue", "cola", "hellaswag"], ["hellaswag"])]
    assert names == [*GLUE, "hellaswag"]
    with pytest.raises(ValueError, match="no task 'gsm8'; did you mean 'gsm8k'"):
        expand(["gsm8"], [])


GLUE_ROWS = {
    "cola": (["sentence", "label"], [["A dog barks.", "1"], ["Dog a barks.", "0"]], [1, 0]),
    "sst2": (["sentence", "label"], [["fine film", "1"], ["dull", "0"]], [1, 0]),
    "mrpc": (
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        [["1", "1", "2", "It rains.", "Rain falls."], ["0", "3", "4", "It rains.", "It's dry."]],
        [1, 0],
    ),
    "qqp": (
        ["id", "question1", "question2", "is_duplicate"],
        [["0", "Who?", "Which man?", "1"], ["1", "Who?", "When?", "0"]],
        [1, 0],
    ),
    "qnli": (
        ["index", "question", "sentence", "label"],
        [["0", "Who?", "He did.", "entailment"], ["1", "Who?", "Now.", "not_entailment"]],
        [0, 1],
    ),
    "rte": (
        ["index", "sentence1", "sentence2", "label"],
        [["0", "It rains.", "It's wet.", "entailment"], ["1", "A", "B", "not_entailment"]],
        [0, 1],
    ),
    "wnli": (
        ["index", "sentence1", "sentence2", "label"],
        [["0", "It fell.", "The cup fell.", "1"], ["1", "A", "B", "0"]],
        [1, 0],
    ),
    "stsb": (
        ["index", "sentence1", "sentence2", "score"],
        [["0", "A cat.", "A dog.", "1.200"], ["1", "A cat.", "One cat.", "4.800"]],
        [1.2, 4.8],
    ),
    "mnli": (
        ["index", "sentence1", "sentence2", "gold_label"],
        [["0", "It rains.", "It's wet.", "entailment"], ["1", "A", "B", "contradiction"]],
        [0, 2],
    ),
    "mnli_mismatch": (
        ["index", "sentence1", "sentence2", "gold_label"],
        [["0", "It rains.", "Wet", "neutral"], ["1", "A", "B", "contradiction"]],
        [1, 2],
    ),
}


@pytest.mark.parametrize("task", GLUE)
def test_every_task_of_glue_reads_its_published_files(task, manager, tmp_path):
    header, rows, labels = GLUE_ROWS[task]
    folder = tmp_path / "GLUE" / {"stsb": "STS-B", "mnli_mismatch": "MNLI"}.get(task, task.upper())
    folder.mkdir(parents=True)
    suffix = {"mnli": "_matched", "mnli_mismatch": "_mismatched"}.get(task, "")
    for name in ("train.tsv", f"dev{suffix}.tsv"):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE).writerows([header, *rows])
    for prompts in ("harness", "trained"):
        made = build(task, manager, tmp_path, prompts=prompts)
        docs = list(made.eval_docs)
        assert [doc["label"] for doc in docs] == labels
        text = made.doc_to_text(docs[0])
        assert all(
            str(value) in text for key, value in docs[0].items() if key not in ("label", "idx")
        )
        if task != "stsb":
            assert made.doc_to_choice(docs[0])[labels[0]]
    metrics = {name for name in made.aggregation() if name != "answered"}
    expected = {"cola": {"mcc"}, "stsb": {"pearson", "spearman"}}
    assert metrics == expected.get(task, {"acc", "f1"} if task in ("mrpc", "qqp") else {"acc"})


def test_the_layout_of_the_hub_is_read(manager, tmp_path, shared_data):
    published = open_local("rte", shared_data, examples=False)["validation"]
    folder = tmp_path / "glue" / "rte"
    folder.mkdir(parents=True)
    published.to_parquet(folder / "validation-00000-of-00001.parquet")
    assert list(open_local("rte", tmp_path, examples=False)["validation"]) == list(published)
    german = open_local("xnli_de", shared_data, examples=False)["validation"]
    for language in ("de", "fr"):
        (tmp_path / "xnli" / language).mkdir(parents=True)
        rows = german if language == "de" else german.select(range(3))
        rows.to_parquet(tmp_path / "xnli" / language / "validation-00000-of-00001.parquet")
    assert len(open_local("xnli_de", tmp_path, examples=False)["validation"]) == 2490
    assert len(open_local("xnli_fr", tmp_path, examples=False)["validation"]) == 3
    problems = datasets.Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}])
    for subset in ("main", "socratic"):
        (tmp_path / "gsm8k" / subset).mkdir(parents=True)
        problems.to_parquet(tmp_path / "gsm8k" / subset / "test-00000-of-00001.parquet")
    assert len(open_local("gsm8k", tmp_path, examples=False)["test"]) == 1


def test_missing_data_are_named(manager, tmp_path, shared_data):
    with pytest.raises(MissingDataError, match="no folder gsm8k"):
        local_folder(tmp_path, "gsm8k")
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(MissingDataError, match="no files for gsm8k"):
        build("gsm8k", manager, tmp_path)
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n')
    with pytest.raises(MissingDataError, match="needs the split 'test'"):
        build("gsm8k", manager, tmp_path)
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl:1: missing field"):
        build("gsm8k", manager, tmp_path)
    with pytest.raises(MissingDataError, match="no files for flores_eng_Latn-xxx_Latn"):
        build("flores_eng_Latn-xxx_Latn", manager, shared_data)


def test_sts_b_reads_numbers(manager, tmp_path):
    folder = tmp_path / "stsb"
    folder.mkdir()
    (folder / "dev.tsv").write_text("sentence1\tsentence2\tscore\nA\tB\t2.5\nC\tD\t5\n")
    (folder / "train.tsv").write_text("sentence1\tsentence2\tscore\nA\tB\t2.5\n")
    task = build("stsb", manager, tmp_path)
    doc = task.eval_docs[0]
    assert task.process_results(doc, [" 3.2, I think"])["pearson"] == (2.5, 3.2)
    unread = task.process_results(doc, ["much alike"])
    assert (unread["spearman"], unread["answered"]) == ((2.5, 0.0), 0.0)


def test_translations_are_scored_by_sacrebleu(manager, shared_data):
    task = build("flores_eng_Latn-zho_Hans", manager, shared_data)
    docs = [task.eval_docs[index] for index in range(4)]
    said = [doc["target"][:-3] + "\nand more" for doc in docs]
    items = [task.process_results(doc, [text]) for doc, text in zip(docs, said, strict=True)]
    references, lines = [doc["target"] for doc in docs], [text.split("\n")[0] for text in said]
    bleu = task.aggregation()["bleu"]([item["bleu"] for item in items])
    assert bleu == sacrebleu.corpus_bleu(lines, [references], tokenize="zh").score
    chrf = task.aggregation()["chrf"]([item["chrf"] for item in items])
    assert chrf == sacrebleu.corpus_chrf(lines, [references]).score
    assert "tok:zh" in TranslationScore("bleu", "zho_Hans").signature


def test_bootstrap_of_a_mean_matches_its_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap_standard_error(np.mean, values)
    assert found == pytest.approx(values.std(ddof=1) / 20, rel=0.1)
    assert Correlation("spearman")([(1, 2), (2, 9), (3, 10)]) == pytest.approx(1.0)
    assert Correlation("pearson")([(1, 2), (2, 2)]) == 0.0


def result(task, suite, *metrics):
    return TaskResult(
        task=task,
        suite=suite,
        rows=10,
        rows_in_all=20,
        seconds=1.0,
        metrics=tuple(Metric(name=n, value=v, standard_error=e) for n, v, e in metrics),
    )


def test_averages_follow_glue_and_count_their_tasks():
    results = [
        result("mrpc", "glue", ("acc", 0.8, 0.03), ("f1", 0.6, 0.04)),
        result("mnli", "glue", ("acc", 0.5, 0.01)),
        result("mnli_mismatch", "glue", ("acc", 0.7, 0.01)),
        result("stsb", "glue", ("pearson", 0.9, 0.02), ("answered", 0.1, None)),
        result("flores_eng_Latn-deu_Latn", "flores", ("bleu", 20.0, 1.0), ("chrf", 50.0, 1.0)),
        result("flores_deu_Latn-eng_Latn", "flores", ("bleu", 30.0, 1.0), ("chrf", 60.0, None)),
    ]
    means = averages(results, [Wanted("mrpc", "glue"), Wanted(results[4].task, "flores")])
    values = {mean["average"]: mean["value"] for mean in means}
    assert values["score"] == pytest.approx((0.7 + 0.6 + 0.9) / 3)
    assert values["bleu, from English"] == 20.0
    assert values["chrf, to English"] == 60.0
    assert (means[0]["tasks"], means[0]["tasks_in_all"]) == (4, 10)
    shown = table(results, means)
    assert "10 of 20" in shown
    assert "4 of 10 tasks" in shown
    assert len({len(line) for line in shown.splitlines()}) == 1
    again = TaskResult.from_mapping(results[0].to_mapping())
    assert again == results[0]
