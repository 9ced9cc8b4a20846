"""What the project says of itself agrees: metadata, citation, changelog, workflows, images."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from peft_jax.version import __version__

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
IMAGES = sorted((ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}


@pytest.fixture(scope="module")
def setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+)(?:[ \w-]*):", text, re.MULTILINE))


def test_the_metadata_are_complete(setup):
    metadata = setup["metadata"]
    expected = {"name", "version", "description", "author", "license"}
    assert expected | {"keywords", "classifiers", "long_description"} <= set(metadata)


def test_the_citation_is_of_this_version(setup):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors"}
    assert required <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["license"] == setup["metadata"]["license"]
    people = [
        *citation["authors"],
        *(one for ref in citation["references"] for one in ref["authors"]),
    ]
    assert all({"name"} <= set(one) or {"family-names"} <= set(one) for one in people)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", citation["date-released"])


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] in (__version__, "Unreleased")
    assert __version__ in headings


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_and_tests_that_exist(path, targets):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML 1.1 reads the key "on" as true.
    assert workflow[True]
    assert workflow["name"] == path.stem
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for other in [job["needs"]] if "needs" in job else []:
            assert other in workflow["jobs"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[\w./]+", step["uses"])
            words = step.get("run", "").split()
            if words[:1] == ["make"]:
                assert {word for word in words[1:] if "=" not in word} <= targets
            for word in words:
                if word.startswith("tests/"):
                    assert (ROOT / word).exists()


def test_there_is_a_workflow_for_tests_docs_and_releases():
    assert [path.stem for path in WORKFLOWS] == ["docs", "release", "tests"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_copy_what_the_wheel_needs_and_install_extras_that_exist(path, setup):
    text = re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = [line.split() for line in lines]
    assert words[0][0] == "FROM"
    assert {line[0] for line in words} <= INSTRUCTIONS
    copied = {name for line in words if line[0] == "COPY" for name in line[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert {"setup.py", "setup.cfg", "peft_jax", "kernels_pallas", "eval", "configs"} <= copied
    (extras,) = re.findall(r"\.\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(setup["options.extras_require"])
    assert path.stem in extras
    assert '"peft-jax"' in next(line for line in lines if line.startswith("ENTRYPOINT"))


def test_there_is_an_image_for_tpus_and_one_for_gpus():
    assert [path.stem for path in IMAGES] == ["gpu", "tpu"]
