"""Recipes format published rows and score predictions."""

import numpy as np
import pytest
import scipy.stats

from peft_jax.data import RECIPES, DataSettings, get_recipe
from peft_jax.data.bad_rows import BadRowError
from peft_jax.data.data_files import open_file
from peft_jax.data.examples import prompt_and_completion
from peft_jax.data.recipes.gsm8k import final_number
from peft_jax.data.recipes.measures import chrf, f1, matthews_correlation, pearson, spearman

HUB_ROWS = {
    "cola": ({"sentence": "They sang.", "label": 1, "idx": 0}, " yes"),
    "sst2": ({"sentence": "a gem ", "label": 1, "idx": 0}, " positive"),
    "mrpc": ({"sentence1": "A.", "sentence2": "B.", "label": 0, "idx": 0}, " no"),
    "qqp": ({"question1": "A?", "question2": "B?", "label": 1, "idx": 0}, " yes"),
    "stsb": ({"sentence1": "A.", "sentence2": "B.", "label": 3.799999952316284, "idx": 0}, " 3.8"),
    "mnli": ({"premise": "A.", "hypothesis": "B.", "label": 1, "idx": 0}, " maybe"),
    "qnli": ({"question": "A?", "sentence": "B.", "label": 1, "idx": 0}, " no"),
    "rte": ({"sentence1": "A.", "sentence2": "B.", "label": 0, "idx": 0}, " yes"),
    "wnli": ({"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 0}, " yes"),
    "xnli": ({"premise": "A.", "hypothesis": "B.", "label": 2}, " no"),
    "gsm8k": ({"question": "1 + 1?", "answer": "So 2.\n#### 2"}, " So 2.\n#### 2"),
    "alpaca": (
        {"instruction": "Add.", "input": "1, 1", "output": "2", "text": "unused"},
        "\n2",
    ),
}

TSV_FILES = {
    "cola": ("gj04\t1\t\tThey sang.\ngj04\t0\t*\tThey sanged.\n", [" yes", " no"]),
    "sst2": ("sentence\tlabel\na gem \t1\nno gem \t0\n", [" positive", " negative"]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t7\t8\tHe said "yes .\tHe agreed .\r\n0\t7\t9\tA .\tB .\r\n',
        [" yes", " no"],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tA?\tB?\t0\n1\t3\t4\tA?\tA?\t1\n",
        [" no", " yes"],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tnews\tf\t2012\t1\tnone\tnone\tA.\tB.\t5.000\n"
        "1\tnews\tf\t2012\t2\tnone\tnone\tA.\tB.\t0.25\n",
        [" 5.0", " 0.2"],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
        "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t1n\tfiction\t(\t)\t(\t)\tA.\tB.\tneutral\tneutral\n"
        "1\t1\t1e\tfiction\t(\t)\t(\t)\tA.\tB.\tneutral\tentailment\n"
        "2\t1\t1c\tfiction\t(\t)\t(\t)\tA.\tB.\tneutral\tcontradiction\n",
        [" maybe", " yes", " no"],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tA?\tB.\tentailment\n1\tA?\tB.\tnot_entailment\n",
        [" yes", " no"],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n1\tA.\tB.\tentailment\n",
        [" no", " yes"],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n1\tA.\tB.\t0\n", [" yes", " no"]),
    "xnli": ("A.\tB.\tneutral\nC.\tD.\tcontradiction\n", [" maybe", " no"]),
}


def test_all_recipes_are_registered():
    assert set(RECIPES) == {*HUB_ROWS, "chat", "flores", "metamath", "text"}
    with pytest.raises(ValueError, match="did you mean 'gsm8k'"):
        get_recipe("gsm8")


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_rows_become_prompts_and_answers(name):
    row, completion = HUB_ROWS[name]
    recipe = get_recipe(name)
    example = recipe.example(row)
    assert example.completion == completion
    assert recipe.completion_only
    assert not example.prompt[-1].isspace()
    texts = [value for key, value in row.items() if isinstance(value, str) and value != "unused"]
    for text in texts[:2] if name not in ("gsm8k", "alpaca") else texts[:1]:
        assert text in example.prompt
    if example.choices:
        assert example.choices[example.label] == completion
        assert completion.strip() == example.answer


@pytest.mark.parametrize("name", TSV_FILES)
def test_official_files_give_the_answers(tmp_path, name):
    content, completions = TSV_FILES[name]
    path = tmp_path / "dev.tsv"
    path.write_bytes(content.encode())
    recipe = get_recipe(name)
    table = recipe.open_file(path, DataSettings(recipe=name))
    assert [recipe.example(table[index]).completion for index in range(len(table))] == completions


def test_label_words_and_templates_can_be_replaced():
    settings = DataSettings(
        recipe="sst2", label_words=("bad", "good"), prompt_template="{sentence} It is"
    )
    recipe = get_recipe("sst2").configured(settings)
    example = recipe.example({"sentence": "a gem", "label": "positive"})
    assert (example.prompt, example.completion) == ("a gem It is", " good")
    assert example.choices == (" bad", " good")
    assert recipe.score(" Good, it is", example) == 1.0


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("sst2", {"label_words": ("good",)}, "has 2 labels"),
        ("sst2", {"label_words": ("good", "Good")}, "data.label_words is "),
        ("gsm8k", {"label_words": ("a",)}, "data.label_words is "),
        ("gsm8k", {"columns": {"qestion": "q"}}, "did you mean 'question'"),
        ("gsm8k", {"prompt_template": "{qestion}"}, "did you mean 'question'"),
        ("gsm8k", {"prompt_template": "{question"}, "prompt_template is '{question': expected"),
        ("text", {"prompt_template": "x"}, "data.prompt_template is 'x'"),
        ("flores", {"target_language": "eng_Latn"}, "are both 'eng_Latn'"),
    ],
)
def test_settings_that_do_not_apply_to_a_recipe_raise(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        get_recipe(recipe).configured(DataSettings(recipe=recipe, **changes))


@pytest.mark.parametrize("setting", ["source_language", "target_language"])
def test_an_error_for_a_missing_language_names_near_matches(tmp_path, setting):
    for code in ("eng_Latn", "deu_Latn", "fra_Latn"):
        (tmp_path / f"{code}.dev").write_text("a\n")
    languages = {"source_language": "eng_Latn", "target_language": "deu_Latn", setting: "fr_Latn"}
    settings = DataSettings(recipe="flores", **languages)
    recipe = get_recipe("flores").configured(settings)
    with pytest.raises(ValueError, match=rf"{setting} is 'fr_Latn'.* did you mean 'fra_Latn'"):
        recipe.find_splits(tmp_path, settings)


def test_an_unknown_language_of_xnli_raises(tmp_path):
    with pytest.raises(ValueError, match=r"data\.language is 'ge'"):
        get_recipe("xnli").find_splits(tmp_path, DataSettings(recipe="xnli", language="ge"))


@pytest.mark.parametrize(
    ("name", "row", "reason", "detail"),
    [
        ("gsm8k", {"question": "q"}, "missing field", "no column 'answer'"),
        ("gsm8k", {"question": "q", "anwser": "a"}, "missing field", "did you mean 'anwser'"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "empty", "'question' is empty"),
        ("gsm8k", {"question": 3, "answer": "#### 1"}, "wrong type", "'question' is a int"),
        ("gsm8k", {"question": "q", "answer": "3"}, "no final answer", "no number after '####'"),
        ("sst2", {"sentence": "a", "label": -1}, "no label", "-1"),
        ("sst2", {"sentence": "a", "label": 2}, "unknown label", "a number below 2"),
        ("sst2", {"sentence": "a", "label": -2}, "unknown label", "a number below 2"),
        ("sst2", {"sentence": "a", "label": True}, "unknown label", "True"),
        ("sst2", {"sentence": "a", "label": "postive"}, "unknown label", "did you mean 'positive'"),
        ("sst2", {"sentence": "a", "label": None}, "no label", "None"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 6.0}, "unknown label", "0 to 5"),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": "x"}, "wrong type", "not a number"),
        ("text", {"text": None}, "wrong type", "NoneType"),
        ("alpaca", {"instruction": "a", "output": ""}, "empty", "'output'"),
    ],
)
def test_unusable_rows_raise_with_a_reason(name, row, reason, detail):
    with pytest.raises(BadRowError, match=detail) as caught:
        get_recipe(name).example(row)
    assert caught.value.reason == reason


def test_the_input_of_an_instruction_is_optional():
    recipe = get_recipe("alpaca")
    bare = recipe.example({"instruction": "Sing.", "output": "La."})
    assert bare.prompt == "### Instruction:\nSing.\n\n### Response:"
    assert recipe.example({"instruction": "Sing.", "input": "", "output": "La."}) == bare
    full = recipe.example({"instruction": "Sing.", "input": "low", "output": "La."})
    assert full.prompt == "### Instruction:\nSing.\n\n### Input:\nlow\n\n### Response:"
    dolly = {"instruction": "Sing.", "context": "low", "response": "La.", "category": "x"}
    assert recipe.example(dolly) == full


@pytest.mark.parametrize(
    "row",
    [
        {"eng_Latn": "Yes.", "fra_Latn": "Oui."},
        {"sentence_eng_Latn": "Yes.", "sentence_fra_Latn": "Oui.", "id": 1},
        {"source": "Yes.", "target": "Oui."},
        {"translation": {"eng_Latn": "Yes.", "fra_Latn": "Oui."}},
    ],
)
def test_translation_pairs_are_read_from_columns(row):
    example = get_recipe("flores").configured(DataSettings(recipe="flores")).example(row)
    assert example.prompt == "English: Yes.\nFrench:"
    assert example.completion == " Oui."


@pytest.mark.parametrize(
    ("prediction", "score"),
    [(" yes", 1), ("Yes.", 1), ("yes\nno", 1), ("yesterday", 0), ("no, yes", 0), ("", 0)],
)
def test_a_classification_is_correct_if_its_answer_begins_with_the_word(prediction, score):
    recipe = get_recipe("rte")
    example = recipe.example({"sentence1": "a", "sentence2": "b", "label": "entailment"})
    assert recipe.score(prediction, example) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### $1,234.50 and more", "1234.50"),
        ("#### 5\nQuestion: what is 9?", "5"),
        ("#### -12", "-12"),
        ("5-3", "3"),
        ("it is -3", "-3"),
        ("The answer is 1,000.", "1000"),
        ("no number", None),
        ("2 and 3 #### none", "3"),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(("prediction", "score"), [("#### 18.0", 1), ("so 18", 1), ("#### 17", 0)])
def test_mathematics_is_right_if_the_number_is(prediction, score):
    recipe = get_recipe("gsm8k")
    example = recipe.example({"question": "q", "answer": "9 * 2\n#### 18"})
    assert example.answer == "18"
    assert recipe.score(prediction, example) == score
    assert recipe.metrics([prediction] * 2, [example] * 2) == {"exact_match": score}


def test_measures_of_a_task():
    recipe = get_recipe("cola")
    labels = [1, 1, 1, 0, 0, 1]
    examples = [recipe.example({"sentence": "a", "label": label}) for label in labels]
    said = [" yes", " no", " yes", " yes", " no", " perhaps"]
    # The sixth is no label's word and counts as wrong: a "no".
    expected = scipy.stats.pearsonr([1, 0, 1, 1, 0, 0], labels).statistic
    found = recipe.metrics(said, examples)
    assert found == pytest.approx({"accuracy": 0.5, "matthews_correlation": expected})
    recipe = get_recipe("mrpc")
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in labels]
    found = recipe.metrics(said, [recipe.example(row) for row in rows])
    assert found == pytest.approx({"accuracy": 0.5, "f1": 2 * 2 / (3 + 4)})


def test_similarity_is_measured_by_correlation():
    recipe = get_recipe("stsb")
    labels = [0.0, 1.5, 2.0, 5.0]
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in labels]
    examples = [recipe.example(row) for row in rows]
    found = recipe.metrics([" 1.0", " 1.0", "about 3", "?"], examples)
    said = [1.0, 1.0, 3.0, 0.0]
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(said, labels).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(said, labels).statistic)
    assert found["closeness"] == pytest.approx(np.mean([0.8, 0.9, 0.8, 0.0]))


def test_metrics_agree_with_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 5, (2, 50)).astype(float)
    assert pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert pearson(a, np.ones(50)) == 0.0
    said, right = generator.integers(0, 2, (2, 200))
    tp, fp, fn, tn = (
        np.sum((said == x) & (right == y)) for x, y in ((1, 1), (1, 0), (0, 1), (0, 0))
    )
    denominator = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert matthews_correlation(said, right) == pytest.approx((tp * tn - fp * fn) / denominator)
    assert f1(said, right) == pytest.approx(tp / (tp + (fp + fn) / 2))
    assert f1(np.zeros(3, int), np.zeros(3, int)) == 0.0


def test_chrf_agrees_with_sacrebleu():
    # The expected values are corpus_chrf and sentence_chrf of sacreBLEU 2.6, divided by 100.
    said = [
        "Le chat est assis sur le tapis.",
        "Il pleut aujourd'hui à Paris",
        "bonjour",
        "完全不同的句子",
    ]
    right = [
        "Le chat était assis sur un tapis.",
        "Aujourd'hui, il pleut à Paris.",
        "au revoir",
        "这是一个句子",
    ]
    assert chrf(said, right) == pytest.approx(0.50098197480139575, abs=1e-12)
    each = [0.5478089748932109, 0.61461860043181225, 0.0886134741370881, 0.08581752484191508]
    for prediction, reference, expected in zip(said, right, each, strict=True):
        assert chrf([prediction], [reference]) == pytest.approx(expected, abs=1e-12)
    assert chrf([""], ["a"]) == 0.0
    recipe = get_recipe("flores").configured(DataSettings(recipe="flores"))
    example = prompt_and_completion("English: x\nFrench:", " " + right[0], answer=right[0])
    assert recipe.score(f" {said[0]}\nEnglish: more", example) == pytest.approx(each[0])
    assert recipe.metrics(said[:1], [example]) == pytest.approx({"chrf": each[0]})


@pytest.mark.parametrize("name", ["text", "alpaca", "chat"])
def test_recipes_with_open_answers_have_no_score(name):
    recipe = get_recipe(name)
    assert recipe.metrics(["a"], [prompt_and_completion("q", "a")]) == {}
    with pytest.raises(ValueError, match="has no score"):
        recipe.score("a", prompt_and_completion("q", "a"))


def test_recipes_know_their_layouts_without_a_header(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("a\tb\tc\td\n")
    settings = DataSettings(recipe="cola")
    table = open_file(path, settings, get_recipe("cola").layout)
    assert dict(table[0]) == {"source": "a", "label": "b", "mark": "c", "sentence": "d"}
