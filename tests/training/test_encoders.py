"""Tests training, evaluation and export of encoders on GLUE's tasks."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax.adapters import AdapterSpec, LoRA, method_settings
from peft_jax.data import DataSettings, LabeledBatch, build_data, get_recipe
from peft_jax.hub import load_adapter, load_classifier, save_adapter, save_model
from peft_jax.models import build_classifier
from peft_jax.parallel import MeshSettings, batch_sharding, make_mesh
from peft_jax.training import RefusedError, run
from peft_jax.training.classifier_evaluation import ClassifierEvaluator, classifier_outputs
from peft_jax.training.placement import RowPlacement

METHODS = ("full", "lora", "lora_ga", "boft", "unitary", "hybrid")
SMALL = {"rank": 2, "block_size": 4}
OWN_ATTRIBUTES = {
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 32,
    },
    "deberta-v2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
    },
    "modernbert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "local_attention": 4,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    },
}
"""Attributes of the families that need others than BERT."""

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "modernbert")


@pytest.fixture(scope="module")
def family_config(bert):
    """Returns a function that returns the configuration of a tiny encoder of any family."""

    def make(kind: str, **settings):
        sizes = {name: value for name, value in bert.items() if name != "architectures"}
        return {**OWN_ATTRIBUTES.get(kind, sizes), "model_type": kind, **settings}

    return make


@pytest.fixture(scope="module")
def encoded(tiny, encoder, data):
    """Returns a function that builds a configuration for the encoder."""

    def make(method: str = "lora", **changes):
        own = {f"method.{k}": v for k, v in SMALL.items() if k in method_settings(method)}
        settings = {
            "model.path": str(encoder),
            "method.name": method,
            "method.target_modules": "all-linear",
            "data.recipe": "sst2",
            "data.path": str(data / "sentiment"),
            "data.prompt_template": None,
            "data.completion_template": None,
            "train.steps": 30,
            "train.batch_size": 8,
            "train.max_length": 8,
            "train.learning_rate": 0.02,
            "checkpoint.every": 0,
        }
        return tiny(**(settings | own | changes))

    return make


@pytest.mark.parametrize(
    "method",
    [
        m if m == "lora" else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
        if m != "trainable_tokens"  # It needs tokens, and one embedding.
    ],
)
def test_every_method_learns_a_classification(method, encoded, tmp_path, listener):
    rate = {"full": 0.003, "lora_ga": 0.005, "hybrid": 0.005}.get(method, 0.02)
    config = encoded(method, **{"train.learning_rate": rate})
    summary = run(config, tmp_path / "run", reporter=listener)
    assert "initialized classifier.bias, classifier.kernel" in listener.text
    assert summary["labels"] == 2
    assert summary["after"]["targets"] == 10
    assert summary["after"]["loss"] < 0.5 * summary["before"]["loss"]
    assert summary["after"]["accuracy"] > 0.8
    page = (tmp_path / "run" / "report" / "README.md").read_text()
    assert "load_classifier(" in page


@pytest.fixture(scope="module")
def finished(encoded, tmp_path_factory):
    """Returns a finished run with gradient accumulation on two devices."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    settings = {"train.steps": 6, "train.gradient_accumulation": 2, "parallel.devices": 2}
    return workdir, run(encoded("lora", **settings), workdir)


@pytest.fixture
def inferences(tmp_path):
    """Returns XNLI's files in Swahili, whose label is given by the second text."""
    labels = ("entailment", "neutral", "contradiction")
    for name, count in (("train", 48), ("dev", 8)):
        rows = [f"w{n % 7}\tw{n % 3 + 10}\t{labels[n % 3]}" for n in range(count)]
        (tmp_path / f"{name}-sw.tsv").write_text("\n".join(rows))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES[1:])
def test_every_family_learns_inferences(
    kind, family_config, encoder, encoded, inferences, tmp_path, listener
):
    """A checkpoint of the bare encoder gets a head for XNLI's three labels."""
    folder = tmp_path / "base"
    shutil.copytree(encoder, folder)
    vocabulary = len((encoder / "vocab.txt").read_text().split())
    # Larger weights than usual, as in `encoder`: a few steps then suffice.
    config = family_config(kind, vocab_size=vocabulary, initializer_range=0.2)
    model = build_classifier(config)
    save_model(folder, model, model.init_params(jax.random.key(0)))
    tensors = load_file(folder / "model.safetensors")
    prefix = model.family.naming.prefix + "."
    kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    changes = {
        "model.path": str(folder),
        "data.recipe": "xnli",
        "data.path": str(inferences),
        "data.language": "sw",
    }
    summary = run(encoded(**changes), tmp_path / "run", reporter=listener)
    assert "initialized classifier" in listener.text
    assert summary["labels"] == 3
    assert summary["after"]["loss"] < 0.5 * summary["before"]["loss"]


def held_out(config, encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    _, data = build_data(config.data, tokenizer, batch_size=8, max_length=8, seed=0, labeled=True)
    return data


def test_adapter_and_head_are_restored(finished, encoded, encoder):
    workdir, summary = finished
    model, params = load_classifier(encoder, num_labels=2, head_key=jax.random.key(9))
    spec, state = load_adapter(workdir / "adapter", model, params)
    assert spec.modules_to_save == ("classifier",)
    data = held_out(encoded(), encoder)
    rows = batch_sharding(make_mesh(MeshSettings(devices=1)))
    whole = jax.NamedSharding(rows.mesh, jax.P())
    placement = RowPlacement(rows=rows, microbatches=whole)
    measured = ClassifierEvaluator(model, spec, data, placement=placement)(
        spec.frozen(params), state
    )
    assert measured["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)
    assert measured["accuracy"] == summary["after"]["accuracy"]

    # Computes the same from logits row by row.
    bound = spec.bind(params, state)
    forward = jax.jit(model)
    losses, right = [], []
    for batch in data:
        for row in range(8):
            if not batch.loss_mask[row]:
                continue
            one = {
                name: jnp.asarray(getattr(batch, field)[row : row + 1])
                for name, field in (
                    ("tokens", "tokens"),
                    ("token_types", "token_types"),
                    ("segment_ids", "segment_ids"),
                )
            }
            logits = np.asarray(forward(bound, **one), np.float64)[0]
            label = int(batch.labels[row])
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
            right.append(np.argmax(logits) == label)
    assert np.mean(losses) == pytest.approx(measured["loss"], rel=1e-5)
    assert np.mean(right) == pytest.approx(measured["accuracy"])


@pytest.mark.slow
def test_transformers_loads_the_merged_model(finished, encoder, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from peft_jax.hub import export_merged

    workdir, _ = finished
    model, params = load_classifier(encoder, num_labels=2, head_key=jax.random.key(9))
    spec, state = load_adapter(workdir / "adapter", model, params)
    export_merged(tmp_path, model, params, spec, state)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens = np.random.default_rng(0).integers(5, 40, (3, 7))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = np.asarray(model(spec.bind(params, state), jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_regression_reports_correlations(encoded, similar, tmp_path, listener):
    from scipy import stats

    config = encoded(
        "lora",
        **{
            "data.recipe": "stsb",
            "data.path": str(similar),
            "train.steps": 60,
            "train.max_length": 12,
        },
    )
    summary = run(config, tmp_path / "run", reporter=listener)
    assert summary["labels"] == 1
    after = summary["after"]
    assert after["loss"] < 0.7 * summary["before"]["loss"]
    model, params = load_classifier(config.model.path, num_labels=1, head_key=jax.random.key(9))
    spec, state = load_adapter(tmp_path / "run" / "adapter", model, params)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    said, right = [], []
    for line in (similar / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        one = tokenizer(row["sentence1"], row["sentence2"], return_tensors="np")
        output = model(
            spec.bind(params, state),
            jnp.asarray(one["input_ids"], jnp.int32),
            token_types=jnp.asarray(one["token_type_ids"], jnp.int32),
        )
        said.append(float(np.clip(float(output[0, 0]), 0, 5)))
        right.append(row["label"])
    assert after["pearson"] == pytest.approx(stats.pearsonr(said, right)[0], abs=1e-4)
    assert after["spearman"] == pytest.approx(stats.spearmanr(said, right)[0], abs=1e-4)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_answers_have_the_order_of_rows(encoded, encoder, similar, monkeypatch, processes):
    """Microbatches are consecutive rows, whatever the number of processes."""
    from scipy import stats

    config = encoded(**{"data.recipe": "stsb", "data.path": str(similar), "train.max_length": 12})
    data = held_out(config, encoder)
    model, params = load_classifier(encoder, num_labels=1, head_key=jax.random.key(9))
    spec = AdapterSpec(
        method=LoRA(rank=2), target_modules="all-linear", modules_to_save=("classifier",)
    )
    state = spec.init(jax.random.key(1), params)
    rows = batch_sharding(make_mesh(MeshSettings(devices=4)))
    placement = RowPlacement(
        rows=rows, microbatches=jax.NamedSharding(rows.mesh, jax.P(None, *rows.spec))
    )
    everywhere = jax.device_put((params, state), jax.NamedSharding(rows.mesh, jax.P()))
    monkeypatch.setattr(jax, "process_count", lambda *_: processes)
    evaluator = ClassifierEvaluator(model, spec, data, placement=placement, microbatches=2)
    measured = evaluator(spec.frozen(everywhere[0]), everywhere[1])

    said, labels = [], []
    bound = spec.bind(params, state)
    forward = jax.jit(model)
    for batch in data:
        outputs = forward(
            bound,
            jnp.asarray(batch.tokens),
            token_types=jnp.asarray(batch.token_types),
            segment_ids=jnp.asarray(batch.segment_ids),
        )
        there = np.asarray(batch.loss_mask) > 0
        said += np.asarray(outputs, np.float64)[there, 0].tolist()
        labels += np.asarray(batch.labels, np.float64)[there].tolist()
    assert len(said) == 11, "the last batch is filled up"
    said = np.clip(said, 0, 5)
    assert measured["pearson"] == pytest.approx(stats.pearsonr(said, labels)[0], abs=1e-5)
    assert measured["spearman"] == pytest.approx(stats.spearmanr(said, labels)[0], abs=1e-5)


def test_pairs_are_truncated_padded_and_given_token_types(encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = [{"sentence1": "w1 w2 w3 w4 w5 w6 w7", "sentence2": "w8 w9", "label": "entailment"}]
    settings = DataSettings(recipe="rte", hold_out=0, shuffle=False)
    recipe = get_recipe("rte").configured(settings)
    from peft_jax.data import LabeledEncoder

    encoder_ = LabeledEncoder(tokenizer, settings, max_length=9)
    (text,) = encoder_.encode(recipe.example(rows[0]))
    words = tokenizer.convert_ids_to_tokens(text.ids.tolist())
    assert words == ["[CLS]", "w1", "w2", "w3", "w4", "[SEP]", "w8", "w9", "[SEP]"]
    assert text.token_types.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert text.label == 0.0
    short = LabeledEncoder(tokenizer, settings, max_length=14)
    row = short.fill_row(short.encode(recipe.example(rows[0])))
    assert row.segment_ids.tolist() == [1] * 12 + [0] * 2
    assert float(row.loss_mask) == 1.0
    assert float(short.fill_row([]).loss_mask) == 0.0


GLUE_ROWS = {
    "cola": ({"sentence": "w1 w2", "label": 1}, ("w1 w2",), 2),
    "sst2": ({"sentence": "w1 good", "label": 1}, ("w1 good",), 2),
    "mrpc": ({"sentence1": "w1", "sentence2": "w2", "label": 0}, ("w1", "w2"), 2),
    "qqp": ({"question1": "w1", "question2": "w2", "label": 0}, ("w1", "w2"), 2),
    "stsb": ({"sentence1": "w1", "sentence2": "w2", "label": 2.75}, ("w1", "w2"), 1),
    "mnli": ({"premise": "w1", "hypothesis": "w2", "label": 2}, ("w1", "w2"), 3),
    "qnli": ({"question": "w1", "sentence": "w2", "label": 0}, ("w1", "w2"), 2),
    "rte": ({"sentence1": "w1", "sentence2": "w2", "label": 0}, ("w1", "w2"), 2),
    "wnli": ({"sentence1": "w1", "sentence2": "w2", "label": 0}, ("w1", "w2"), 2),
}


@pytest.mark.parametrize("task", GLUE_ROWS)
def test_glue_recipes_give_texts_and_a_label(task):
    row, sentences, labels = GLUE_ROWS[task]
    recipe = get_recipe(task)
    example = recipe.example(row)
    assert example.sentences == sentences
    assert recipe.num_labels == labels
    if labels == 1:
        assert example.value == 2.75
        assert float(recipe.answer_of(7.0)) == 5.0
        assert float(recipe.answer_of(-0.5)) == 0.0
    else:
        assert example.label == row["label"]
        assert (
            recipe.metrics([recipe.answer_of(float(example.label))], [example])["accuracy"] == 1.0
        )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data.recipe": "gsm8k"}, r"data\.recipe is 'gsm8k'"),
        ({"data.prompt_template": "{sentence}!"}, "prompt_template"),
        ({"data.too_long": "split"}, "cannot be split"),
        ({"train.max_length": 64}, "positions for 32"),
    ],
    ids=str,
)
def test_invalid_settings_of_an_encoder_are_rejected(changes, named, encoded, tmp_path, listener):
    with pytest.raises(RefusedError, match=named):
        run(encoded(**changes), tmp_path / "run", reporter=listener)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_peft_loads_the_adapter_with_its_head(kind, family_config, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = build_classifier(family_config(kind, vocab_size=40), num_labels=3)
    params = model.init_params(jax.random.key(0))
    save_model(tmp_path / "base", model, params)
    spec = AdapterSpec(
        method=LoRA(rank=2), target_modules="all-linear", modules_to_save=model.head_modules
    )
    state = spec.init(jax.random.key(1), params)
    noisy = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), state.trainable
    )
    state = type(state)(trainable=noisy, constant=state.constant)
    save_adapter(tmp_path / "adapter", model, spec, state, str(tmp_path / "base"))
    tokens = np.random.default_rng(0).integers(5, 40, (2, 6))
    found = np.asarray(model(spec.bind(params, state), jnp.asarray(tokens, jnp.int32)))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    again, loaded = load_adapter(tmp_path / "adapter", model, params)
    assert again == spec
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, loaded, state)))

    # PEFT writes the same files.
    theirs.save_pretrained(tmp_path / "from_peft")
    other, read = load_adapter(tmp_path / "from_peft", model, params)
    again = np.asarray(model(other.bind(params, read), jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(again, expected, atol=1e-4 * np.abs(expected).max())


def test_padding_rows_have_no_loss(bert):
    model = build_classifier({**bert, "vocab_size": 40}, num_labels=2)
    params = model.init_params(jax.random.key(0))
    batch = LabeledBatch(
        tokens=jnp.ones((2, 4), jnp.int32),
        token_types=jnp.zeros((2, 4), jnp.int32),
        segment_ids=jnp.asarray([[1, 1, 1, 0], [0] * 4], jnp.int32),
        labels=jnp.asarray([1.0, 0.0]),
        loss_mask=jnp.asarray([1.0, 0.0]),
    )
    _, losses = classifier_outputs(model, params, batch)
    assert losses[0] > 0
    assert losses[1] == 0.0
