"""What the documents say is true: their Python runs, their commands exist, the everyday script runs them all."""

import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

import formary
from formary.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
EVERYDAY = {"README.md": "Everyday use", "README.zh.md": "日常使用"}
NOVEL = "\n\n".join(
    f"Chapter {number}. It was a quiet morning, and the {number * 7}th guest had not come. "
    f"She counted {number + 3} letters, read {number} of them twice, and went for a walk of {number * 2} miles."
    for number in range(1, 120)
)
RECIPE = """
name: novel
data: {sources: [novel.txt], documents: paragraph, tokenizer: {vocab_size: 300}}
model: {size: 1x32}
train: {steps: 4, batch: 4, context: 32}
evaluate: {bootstrap: 100}
generate: {prompts: ["It was a"], max_tokens: 8}
machine: {threads: 1, precision: float32}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, and the line its first line of code stands on."""

    language: str
    line: int
    code: str


def blocks(name):
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text := (ROOT / name).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


def execute(name):
    """Run the Python blocks of a document in one namespace; a failure names the document's own line."""
    namespace = {}
    for block in blocks(name):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / name), "exec"), namespace)
    return namespace


def commands(text):
    """The `formary ...` lines of some shell text, without their comments."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line.startswith("formary ")]


def documented_commands(name):
    return [(name, line) for block in blocks(name) if block.language == "bash" for line in commands(block.code)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with novel.txt, other.txt, novel.yaml and the tiny model that came of them, as the README has it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "novel.txt").write_text(NOVEL, encoding="utf-8")
    (folder / "other.txt").write_text(NOVEL[:2000], encoding="utf-8")
    (folder / "novel.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        formary.run("novel.yaml")
    return folder


@pytest.mark.parametrize("name", [*READMES, "docs/guide.md"])
def test_the_python_of_the_readmes_and_the_guide_runs(name, trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert execute(name)


def test_the_formulas_of_the_mathematics_chapter_hold():
    assert execute("docs/mathematics.md")


@pytest.mark.parametrize(
    ("document", "line"),
    [entry for name in (*READMES, "docs/guide.md", "CONTRIBUTING.md") for entry in documented_commands(name)],
)
def test_every_documented_command_and_its_options_exist(document, line):
    _, name, *arguments = shlex.split(line)
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    assert any(name in group for group in cli.COMMANDS.values()), f"{document}: there is no command {name}"
    try:
        cli._load(name).make_context(name, arguments)
    except SystemExit:
        pytest.fail(f"{document}: {line}")


@pytest.mark.parametrize("name", READMES)
def test_the_everyday_script_runs_the_everyday_commands(name):
    section = re.search(rf"^## {EVERYDAY[name]}\n(.*?)^## ", (ROOT / name).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert section, f"{name} has no section {EVERYDAY[name]}"
    shell = re.findall(r"^```bash\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    documented = commands("\n".join(shell))
    assert len(documented) > 10
    assert commands((ROOT / "docs/everyday.sh").read_text("utf-8")) == documented


@pytest.mark.parametrize("name", [*READMES, "docs/guide.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_that_exist(name):
    document = ROOT / name
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text("utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{name} links to {target}"


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_lists_every_recipe_field_as_the_schema_has_it():
    guide = (ROOT / "docs/guide.md").read_text("utf-8")
    assert reference().with_recipe_tables(guide) == guide, "run `make docs`, which brings docs/guide.md up to date"


def test_the_reference_has_a_page_for_every_room_and_names_the_public_functions(tmp_path):
    reference().write_reference(tmp_path)
    rooms = {path.parent.name for path in (ROOT / "src/formary").glob("*/__init__.py")}
    assert {path.stem for path in tmp_path.glob("*.md")} >= {*rooms, "index"}
    assert "load(path: str | Path, *, precision: str='float32') -> Model" in (tmp_path / "infer.md").read_text("utf-8")
