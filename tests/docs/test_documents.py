"""Tests that everything that the documents name exists."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from configs import demo, finetune, pretrain_tiny
from peft_jax.adapters import METHODS
from peft_jax.cost import find_topology
from peft_jax.data.recipes import RECIPES
from peft_jax.models import ENCODERS, FAMILIES
from peft_jax.parallel import make_mesh
from peft_jax.plan.planner import find_model
from peft_jax.training import RunConfig, default_config, from_config_dict
from peft_jax.training.blueprint import draw_blueprint
from tests.docs.pages import DOCUMENTS, ROOT, headless_tables

GENERATED = re.compile(r"settings\.md|changelog\.md|api/.*")
"""Pages that the site generates from code; its strict build checks links to them."""
each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


@each_document
def test_link_targets_exist(path: Path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8"))
    written = [target for target in targets if not GENERATED.fullmatch(target)]
    missing = [target for target in written if not (path.parent / target).exists()]
    assert not missing


@each_document
def test_named_files_exist(path: Path):
    named = re.findall(
        r"\b(?:configs|docs|examples|peft_jax|tests|benchmarks|assets)/[\w./]*\w",
        path.read_text(encoding="utf-8"),
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@each_document
def test_settings_exist(path: Path):
    text = path.read_text(encoding="utf-8")
    known = default_config()
    sections = "|".join(name for name in known if hasattr(known[name], "keys"))
    named = re.findall(r"--config\.([a-z_]+\.[a-z_.]+)", text)
    named += re.findall(rf"`((?:{sections})\.(?!py`)[a-z_.]+)`", text)
    for name in named:
        section = known
        for part in name.split("."):
            if hasattr(section, "keys") and not section:
                break  # A mapping with names of the user, such as optimizer.learning_rates.
            assert part in section, f"{name} is not a setting"
            section = section[part]


def test_every_method_and_recipe_is_described():
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"## `{name}`" not in methods] == []
    assert [name for name in METHODS if f"| `{name}`" not in readme] == []
    data = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"`{name}`" not in data] == []


def test_documented_learning_rates_match_the_methods():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if "| `pj." in line]
    rates = {cells[1].strip(" `"): float(cells[6]) for cells in rows}
    assert rates == {name: method.learning_rate for name, method in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_configuration_of_the_demo_accepts_every_method(method: str):
    assert from_config_dict(demo.get_config(method)).spec.method.name == method


def test_configurations_are_valid():
    assert from_config_dict(pretrain_tiny.get_config()).model.weights == "random"
    config = finetune.get_config("lora")
    config.model.path, config.data.recipe = "somewhere", "gsm8k"
    assert from_config_dict(config).spec.method.name == "lora"


def configuration_of(command: str) -> RunConfig:
    """Returns the configuration of a command with its flags."""
    flags = dict(re.findall(r"--config((?:\.[\w.]+)?)=([^\s\"',\]]+)", command))
    file, _, arg = flags.pop("").partition(":")
    config = importlib.import_module(f"configs.{Path(file).stem}").get_config(arg)
    for name, text in flags.items():
        *sections, key = name.strip(".").split(".")
        section = config
        for part in sections:
            section = section[part]
        section[key] = type(section[key])(text)
    return from_config_dict(config)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu describes the topology"
)
def test_commands_for_pods_match_the_topology():
    """The pod of the commands, `v5p-256` or 4x4x8, has 128 chips."""
    text = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    commands = re.findall(r"\btrain(?:\.py)?[ ,]+--distributed(?:.|\n)*?['\]]\n", text)
    assert len(commands) == 2
    one, other = map(configuration_of, commands)
    assert one == other
    mesh = make_mesh(one.parallel, find_topology("v5p:4x4x8").devices)
    draw_blueprint(one, find_model(one), mesh)


def test_the_page_on_pods_gives_the_mesh_of_its_command():
    text = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    command = re.findall(r"\btrain\.py --distributed(?:.|\n)*?'\n", text)[0]
    parallel = configuration_of(command).parallel
    said = re.search(
        r"shards the hybrid's model (\d+) times along `fsdp` and (\d+) times along `tensor`: (\d+)"
        r" chips",
        text.replace("\n", " "),
    )
    assert said is not None
    fsdp, tensor, chips = map(int, said.groups())
    assert (fsdp, tensor) == (parallel.fsdp, parallel.tensor)
    assert chips == fsdp * tensor


@each_document
def test_every_table_has_a_header(path: Path):
    assert headless_tables(path.read_text(encoding="utf-8")) == []


def test_a_row_without_a_header_is_found():
    table = "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
    assert headless_tables(table) == []
    assert headless_tables(table + "\n| 3 | 4 |\n| 5 | 6 |\n") == [5]
    assert headless_tables(table.replace("---", "--- | ---", 1)) == [1]
    assert headless_tables("```text\n| no table |\n```\n") == []


def test_counts_match_the_registries():
    """Families of decoders are the rows of their table, some of which have several types."""
    models = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    decoders = models.partition("## Decoders")[2].partition("\n\nEach variant")[0]
    rows = [line.split("|")[2] for line in decoders.splitlines() if line.startswith("| ")][2:]
    types = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(types) == sorted(FAMILIES)
    counts = {
        r"(\d+)\s+methods": len(METHODS),
        r"(\d+)\s+families\s+of\s+language\s+models": len(rows),
        r"(\d+)\s+families\s+of\s+encoders": len(ENCODERS),
    }
    pages = ("README.md", "docs/index.md", "examples/quickstart.ipynb")
    for pattern, count in counts.items():
        said = {page: re.findall(pattern, (ROOT / page).read_text("utf-8")) for page in pages}
        assert {int(number) for found in said.values() for number in found} == {count}
        assert said["docs/index.md"]
    assert re.findall(r"(\d+)\s+methods", (ROOT / "README.md").read_text("utf-8"))
