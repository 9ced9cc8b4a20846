"""Tests PEFT's comparison on MetaMathQA against its protocol, written again with torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from byte_tokenizer import make_tokenizer

from configs import metamath
from eval.metamath.command import main, read_texts
from eval.metamath.protocol import (
    batches_by_length,
    cosine_with_warmup,
    is_short,
    loss_function,
    make_batch,
    validation_indices,
)
from eval.metamath.questions import read_questions
from eval.metamath.run import protocol_optimizer
from peft_jax.data import DataSettings
from peft_jax.data.recipes.metamath import TEMPLATE, as_number, final_answer, is_right
from peft_jax.hub import load_model
from peft_jax.runtime.errors import RefusedError
from peft_jax.training import from_config_dict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def metamath_row(number):
    words = " ".join(f"{number + at} apples" for at in range(number % 7))
    return {
        "type": "GSM_Rephrased",
        "query": f"How many are {words} and {number}?",
        "original_question": "",
        "response": f"Count them: {number}{'.' * (number % 5)}\n#### {number}\n"
        f"The answer is: {number}",
    }


def gsm8k_row(number):
    return {
        "question": f"What is {number} plus {number}?",
        "answer": f"It is <<{number}+{number}={2 * number}>>{2 * number}.\n#### {2 * number}",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a small checkpoint, `metamath/` and `gsm8k/`."""
    folder = tmp_path_factory.mktemp("metamath")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    long = {**metamath_row(3), "query": "very " * 300}
    for name, rows in (
        ("metamath/train", [metamath_row(1), long, *map(metamath_row, range(2, 102))]),
        ("gsm8k/train", map(gsm8k_row, range(60))),
        ("gsm8k/test", map(gsm8k_row, range(60, 66))),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder / "model")


def read(folder, tokenizer, **own):
    given = {"steps": 3, "batch_size": 4, "max_length": 768} | own
    data = DataSettings(
        recipe="metamath", path=str(folder / "metamath"), eval_path=str(folder / "gsm8k")
    )
    return read_questions(data, tokenizer, **given)


# The protocol, as run.py, data.py and utils.py have it.


def reference_rows(folder, tokenizer, name, limit=768):
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    kept = [row for row in rows if len(f"{row['query']} {row['response']}") <= 1300]
    texts = [
        "Question: {query} Think step by step.\nAnswer:".format(query=row["query"])
        + row["response"]
        for row in kept
    ]
    return [ids[:limit] for ids in tokenizer(texts)["input_ids"]]


def reference_batches(rows, batch_size):
    for start in range(0, len(rows), 20 * batch_size):
        bucket = rows[start : start + 20 * batch_size]
        lengths = torch.tensor([len(row) for row in bucket])
        # The protocol does not ask for a stable order, so that of rows of equal length is open.
        order = torch.argsort(lengths, descending=True, stable=True)
        assert lengths[order].equal(lengths[torch.argsort(lengths, descending=True)])
        ordered = [bucket[at] for at in order]
        for at in range(0, len(ordered), batch_size):
            yield ordered[at : at + batch_size]


def reference_loss(model, tokenizer, rows):
    """Returns labels and loss of a training step."""
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    labels = batch["input_ids"].clone()
    for index, row in enumerate(rows):
        labels[index, len(row) + 1 :] = -100
    with torch.no_grad():
        out = model(**batch, labels=labels, num_items_in_batch=batch["attention_mask"].sum())
    return labels.numpy(), float(out.loss)


def reference_answer(text):
    marks = [
        "The answer is: ",
        "The answer is ",
        "The final answer is: ",
        "The final answer is ",
        "#### ",
    ]
    text = text.strip().rstrip(".!?")
    for mark in marks:
        if mark in text:
            return text.rpartition(mark)[-1].strip().split("\n", 1)[0].strip(" .!?$%")
    return None


def reference_value(answer):
    from decimal import Decimal, InvalidOperation

    if answer is None:
        return None
    try:
        if "/" in answer:
            above, below = answer.strip().split("/")
            return float(Decimal(above.strip()) / Decimal(below.strip()))
        return float(Decimal(answer.strip()))
    except (InvalidOperation, ValueError):
        return answer


# Rows.


def test_rows_and_their_tokens_are_those_of_the_protocol(folder, tokenizer):
    found = read(folder, tokenizer, steps=20)
    wanted = reference_rows(folder, tokenizer, "metamath/train.jsonl")
    assert [list(row) for row in found.train] == wanted[:80]
    assert tokenizer.decode(found.train[0], skip_special_tokens=True) == (
        "Question: How many are 1 apples and 1? Think step by step.\nAnswer:Count them: 1.\n#### 1"
        "\nThe answer is: 1"
    )
    assert [list(row[:30]) for row in read(folder, tokenizer, max_length=30).train] == [
        row[:30] for row in wanted[:80]
    ]
    assert found.test[0].solution == gsm8k_row(60)["answer"]
    assert (
        list(found.test[0].tokens)
        == tokenizer(TEMPLATE.format(query="What is 60 plus 60?")).input_ids
    )
    np.random.seed(0)
    indices = np.arange(60)
    np.random.shuffle(indices)
    assert [one.solution for one in found.validation] == [
        gsm8k_row(int(number))["answer"] for number in indices[:50]
    ]
    assert len(validation_indices(7473)) == 50
    assert not is_short("q" * 1300, "r")


def test_too_few_rows_are_rejected(folder, tokenizer):
    with pytest.raises(ValueError, match=r"101 rows .* 30 steps of 4 rows need 120"):
        read(folder, tokenizer, steps=30)


def test_batches_labels_and_losses_are_those_of_the_protocol(folder, tokenizer):
    rows = read(folder, tokenizer, steps=20).train
    model, params = load_model(folder / "model")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    loss = jax.jit(lambda params, batch: loss_function(64)(model, params, batch))
    order = batches_by_length([len(row) for row in rows], 4)
    expected = reference_batches([list(row) for row in rows], 4)
    for step, (indices, wanted) in enumerate(zip(order, expected, strict=True)):
        assert [list(rows[index]) for index in indices] == wanted
        labels, value = reference_loss(reference, tokenizer, wanted)
        batch = make_batch([rows[index] for index in indices], tokenizer.eos_token_id)
        targets, mask = batch["rows"].targets, batch["rows"].loss_mask > 0
        width = labels.shape[1] - 1
        np.testing.assert_array_equal(mask[:, :width], labels[:, 1:] != -100)
        assert not mask[:, width:].any()
        np.testing.assert_array_equal(
            targets[:, :width][mask[:, :width]], labels[:, 1:][labels[:, 1:] != -100]
        )
        if step < 3:
            total, weight = loss(params, batch)
            assert float(total) / float(weight) == pytest.approx(value, rel=2e-5)


def test_schedule_is_that_of_transformers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for steps in (5000, 30, 5):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        wanted = transformers.get_cosine_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
        factor = cosine_with_warmup(steps)
        for step in {0, 1, steps // 10, steps // 2, steps - 1}:
            assert float(factor(step)) == pytest.approx(wanted.lr_lambdas[0](step), abs=1e-6)


def test_steps_are_those_of_torch():
    config = metamath.get_config("lora,precision=float32")
    config.train.steps = 20
    optimizer = protocol_optimizer(from_config_dict(config))
    rng = np.random.default_rng(0)
    # Small numbers, beside which steps of 1e-4 are not rounded away.
    start = {n: 0.01 * rng.standard_normal((2, 6, 4)).astype(np.float32) for n in "ab"}
    params = {"layers": {"q_proj": {"kernel": jax.tree.map(jnp.asarray, start)}}}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    wanted = torch.optim.AdamW(theirs.values(), lr=1e-4, weight_decay=0.1)
    schedule = transformers.get_cosine_schedule_with_warmup(wanted, 2, 20)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(20):
        gradients = {name: rng.standard_normal((2, 6, 4)).astype(np.float32) for name in "ab"}
        for name, gradient in gradients.items():
            theirs[name].grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        wanted.step()
        schedule.step()
        given = {"layers": {"q_proj": {"kernel": jax.tree.map(jnp.asarray, gradients)}}}
        updates, state = update(given, state, params)
        params = optax.apply_updates(params, updates)
    for name, value in theirs.items():
        moved = value.detach().numpy() - start[name]
        found = np.asarray(params["layers"]["q_proj"]["kernel"][name]) - start[name]
        np.testing.assert_allclose(found, moved, rtol=1e-3, atol=2e-8)


@pytest.mark.parametrize("method", [*metamath.EXPERIMENTS, *metamath.OURS, "full", "ln_tuning"])
def test_configurations_of_all_methods_are_valid(method):
    config = from_config_dict(metamath.get_config(method))
    assert config.train.steps == 5000
    assert config.spec.method.name == method
    assert config.model.dtype == "bfloat16"
    assert config.spec.dtype == "float32"


# Answers.

TEXTS = (
    "The dot product is $4^2 = \\boxed{16}$.The answer is: 16",
    "so it is.\n#### 1,200",
    "The answer is 12. The answer is: 3.50!",
    "#### 4\nThe answer is: 5\nQuestion: more",
    "The final answer is: $\\frac{1}{2}$",
    "The answer is: 20/14",
    "The answer is: 1/0",
    "The answer is: 1/2/3",
    "The answer is:7",
    "50%\n#### 50%",
    "Question: 2 + 2? Think step by step.\nAnswer:",
    "The answer is x = 3.",
    "The answer is: ",
)


@pytest.mark.parametrize("text", TEXTS)
def test_answers_are_those_of_the_protocol(text):
    answer = reference_answer(text)
    assert final_answer(text) == answer
    number = as_number(answer)
    value = reference_value(answer) if answer != "1/0" else answer
    assert (None if number is None else float(number)) == (
        value if isinstance(value, float) else None
    )
    for solution in ("#### 16", "#### 1,200", "#### 5", "The answer is: 10/7", "#### 50"):
        right = reference_value(reference_answer(solution))
        assert is_right(text, solution) == (answer is not None and value == right)


# The command.


def flags(folder, workdir, *more):
    return [
        f"--config=metamath.py:{more[0] if more else 'lora'},precision=float32",
        f"--workdir={workdir}",
        f"--texts={folder / 'texts.jsonl'}",
        f"--config.model.path={folder / 'model'}",
        f"--config.data.path={folder / 'metamath'}",
        f"--config.data.eval_path={folder / 'gsm8k'}",
        "--config.data.eval_rows=3",
        "--config.train.steps=2",
        "--config.evaluate.every=2",
        "--config.method.rank=2",
        "--config.parallel.devices=1",
        *more[1:],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "lora_ga"])
def test_a_row_has_the_form_of_the_published_ones(folder, tmp_path, method, capsys):
    (folder / "texts.jsonl").write_text('{"text": "Once upon a time."}\n' * 5)
    assert main(flags(folder, tmp_path / "run", method)) == 0
    row = json.loads((tmp_path / "run" / "row.json").read_text())
    valid, test = row["train_info"]["metrics"]
    assert valid["step"] == test["step"] == 2
    assert valid["train samples"] == test["train samples"] == 8
    rows = reference_rows(folder, make_tokenizer(), "metamath/train.jsonl")[:80]
    batches = list(reference_batches(rows, 4))[:2]
    assert test["train total tokens"] == sum(len(r) + 1 for batch in batches for r in batch)
    assert 0 <= test["test accuracy"] <= 1
    assert np.isfinite(test["forgetting"])
    assert row["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert row["train_info"]["file_size"] > 0
    assert row["run_info"]["experiment_name"] == f"{method}/run"
    # What the published table reads of a row (processing.py).
    for name in ("accelerator_memory_reserved_avg", "accelerator_memory_max", "train_time"):
        assert name in row["train_info"]
    assert row["meta_info"]["package_info"]["torch-version"].startswith("jax ")
    assert main(flags(folder, tmp_path / "run", method)) == 2
    assert "has a row already" in capsys.readouterr().err


def test_texts_that_cannot_be_read_are_named(tmp_path):
    assert read_texts("none") == []
    file = tmp_path / "texts.jsonl"
    file.write_text('{"txt": "a"}\n')
    with pytest.raises(RefusedError, match=r"texts.jsonl has a line without a field text"):
        read_texts(str(file))
