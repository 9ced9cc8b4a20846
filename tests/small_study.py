"""Makes a small study: its model and rows, and cells of it that no training made."""

import dataclasses
import json

import jax
import numpy as np

from eval.study.facts import facts_digest
from eval.study.settings import ArmSettings, Roles, StudySettings, TaskSettings, digest
from eval.study.store import Store
from eval.study.timing import Timing
from peft_jax.training import config_files

WORDS = [f"w{number}" for number in range(20)]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SMALL = {"rank": 2, "target_modules": ("q_proj", "down_proj")}


def write_checkpoint(folder):
    """Writes a random Llama with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from peft_jax.hub import save_model
    from peft_jax.models import build_model

    words = ["<pad>", "</s>", "<s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    config = {**LLAMA, "vocab_size": len(words), "bos_token_id": 2, "eos_token_id": 1}
    model = build_model(config)
    save_model(folder, model, model.init_params(jax.random.key(0)))


def write_rows(folder):
    """Writes rows in which the answer to a word is the second word after it."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 80), ("test", 12)):
        lines = []
        for at in generator.integers(0, len(WORDS) - 2, count):
            lines.append({"instruction": WORDS[at], "input": "", "output": WORDS[at + 2]})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def small_study(checkpoint, rows):
    """Returns a study of three arms on one task, with four trials each."""
    config = config_files.base(method="lora", precision="float32")
    config.model.path = str(checkpoint)
    config.data.recipe = "alpaca"
    config.data.path = str(rows)
    config.data.prompt_template = "{instruction}"
    config.data.completion_template = " {output}"
    config.data.hold_out = 16
    config.data.prefetch = 0
    config.data.packing = False
    config.train.steps = 4
    config.train.batch_size = 4
    config.train.max_length = 4
    config.optimizer.schedule.name = "cosine"
    config.parallel.devices = 1
    task = TaskSettings(
        name="words",
        title="Words",
        config=config,
        test={"eval_split": "test"},
        grids={"low": (1e-3, 1e-2), "turn": (2e-3, 2e-2)},
        scales=(1.0, 4.0),
        tune_steps=2,
        own_texts=4,
        curve_rows=8,
        curve_points=2,
        mixing={"rotation_rate": 2.0},
    )

    def arm(title, grid="low", **method):
        return ArmSettings(name=title, title=title, method=method, grid=grid)

    turning = {"block_size": 4, "target_modules": SMALL["target_modules"]}
    return StudySettings(
        name="small",
        title="A small study",
        tasks=(task,),
        arms=(
            arm("low", name="lora_ga", **SMALL),
            arm("turn", "turn", name="boft", **turning),
            arm("both", name="hybrid", block_size=4, **SMALL),
        ),
        roles=Roles(hybrid="both", branches=("low", "turn"), lora="low"),
        tune_seed=0,
        seeds=(1, 2),
        extensions=1,
    )


def fake_cells(study, folder, *, losses=None, seed=0, rows=12):
    """Writes all cells of a study, with random losses and without training.

    Args:
      study: Settings of the study.
      folder: Work directory.
      losses: Mean loss by name of arm; those of other arms are 1.
      seed: Seed of the losses.
      rows: Number of test rows.
    """
    store = Store(folder)
    generator = np.random.default_rng(seed)
    for task in study.tasks:
        targets = generator.integers(2, 9, rows)
        by_row = generator.normal(0.0, 0.3, rows)
        by_seed = {seed: generator.normal(0.0, 0.02) for seed in study.seeds_of(task)}
        for arm in study.arms_of(task):
            level = (losses or {}).get(arm.name, 1.0)
            grid = study.grid(task, arm)
            for point in grid.points():
                # The best trial is at the lowest rate and scale, so that the search extends.
                cell = _tuning_cell(study, task, arm, grid.trial(point), level + sum(point) / 10)
                store.write(task, arm, cell, final=False)
            for at in range(1, study.extensions + 1):
                cell = _tuning_cell(study, task, arm, grid.trial((-at, 0)), level - at / 100)
                store.write(task, arm, cell, final=False)
            chosen = grid.trial((-study.extensions, 0))
            for number in study.seeds_of(task):
                noise = generator.normal(0.0, 0.01, rows)
                per_target = level + by_row + by_seed[number] + noise
                cell = _final_cell(task, arm, chosen, number, per_target * targets, targets)
                store.write(task, arm, cell, final=True)
        timed = study.timed_on(task)
        costs = {
            arm.name: Timing(rounds=(0.1, 0.2, 0.4), step_bytes=(at + 1) << 20)
            for at, arm in enumerate(timed)
        }
        store.write_timing(task, timed, costs)
        store.write_facts(task, facts_digest(study, task), FACTS)
    return store


FACTS = {
    "rows": {
        "train": {"rows": 64, "checked": 9, "used": 8, "left_out": {"too long": 1}, "truncated": 0},
        "test": {"rows": 12, "checked": 12, "used": 12, "left_out": {}, "truncated": 0},
    },
    "text": {
        "rows": 12,
        "rows_affected": 3,
        "characters": 200,
        "lost": 5,
        "symbols": {"=": 3, "+": 2},
    },
    "base_loss": 2.0,
    "base_parameters": 1234,
    "four_bit": True,
}


def _tuning_cell(study, task, arm, trial, loss):
    return _cell(task, arm, trial, study.tune_seed, loss, final=False)


def _final_cell(task, arm, trial, seed, losses, targets):
    cell = _cell(task, arm, trial, seed, losses.sum() / targets.sum(), final=True)
    mixing = {}
    if arm.mixes:
        series = {name: [0.5, 0.6] for name in ("low", "mean", "high")}
        mixing = {"layers": {**series, "by_layer": [0.55]}}
    return {
        **cell,
        "row_losses": [float(f"{x:.5g}") for x in losses],
        "row_targets": targets.tolist(),
        "calibration": {"ece": 0.1, "confidence": 0.5, "accuracy": 0.4},
        "forgetting": 0.25,
        "curve": {"steps": [2, 4], "losses": [cell["loss"] + 0.5, cell["loss"]]},
        "steps": {
            "taken": 4,
            "train_loss": [2.0, 1.0],
            "grad_norm": [1.0, 2.0],
            "branch_norm": {},
            "clipped": {"low_rank": 0.5, "rotation": 0.25} if arm.mixes else {"all": 0.75},
            "lambda": mixing,
        },
    }


def _cell(task, arm, trial, seed, loss, *, final):
    return {
        "task": task.name,
        "arm": arm.name,
        "digest": digest(task.run_config(arm, trial, seed=seed, final=final), task, final=final),
        "source": {},
        "machine": "a machine",
        "learning_rate": trial.rate,
        "attention_scale": trial.scale,
        "seed": seed,
        "diverged": False,
        "trainable_parameters": 100,
        "step_bytes": 3 << 20,
        "loss": float(f"{loss:.6g}"),
        "measures": {},
        "seconds": 1.0,
    }


def without_source(study):
    """Returns the study with names on the hub in place of folders, whose cells have no source."""
    (task,) = study.tasks
    config = type(task.config)(task.config.to_dict())
    config.model.path, config.data.path = "some/model", "some/rows"
    return dataclasses.replace(study, tasks=(dataclasses.replace(task, config=config),))
