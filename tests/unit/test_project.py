"""The project itself: pinned versions, packages, targets, nothing unsafe, nothing tied to one machine."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("albert", "data_prep", "launcher", "benchmarks", "ds_configs", "slurm")


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def source_files() -> list[Path]:
    return [
        path
        for path in tracked_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in PACKAGES
    ]


def normal(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {normal(line): line.split("==")[1] for line in lines}


def test_every_requirement_is_pinned():
    required = list(PROJECT["project"]["dependencies"])
    for group in ("test", "bench", "lint"):
        required += PROJECT["project"]["optional-dependencies"][group]
    assert {normal(item) for item in required} - set(pins()) == set()


def test_pins_are_exact_and_name_no_place():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line), line
    assert pins()["torch"] == "2.13.0"
    assert pins()["deepspeed"] == "0.19.8"


def test_every_package_is_listed_and_documented():
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in tracked_files()
        if path.name == "__init__.py" and path.relative_to(ROOT).parts[0] in set(PACKAGES) - {"benchmarks"}
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_entry_points_exist():
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, target


def test_make_lists_its_targets():
    text = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make (\w+)", text, re.MULTILINE)[:6] == [
        "help",
        "setup",
        "demo",
        "test",
        "lint",
        "bench",
    ]
    assert subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout == text


def test_make_names_an_interpreter_that_is_too_old(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\ncase "$2" in *version_info*print*|*print*) echo 3.8 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "older than Python 3.11; name another one: make setup PYTHON=python3.12" in result.stderr
    assert not (tmp_path / "venv").exists()


MACHINE = re.compile(
    r"(?<![\w.])/(?:work|root|home)/\w|pypi\.org|files\.pythonhosted|/opt/(?:pypi|wheels)|find-links|index-url"
)


def test_no_file_names_a_machine_or_a_registry():
    this = Path(__file__)
    wrong = []
    for path in tracked_files():
        if path == this:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {found.group()}" for found in MACHINE.finditer(text)]
    assert wrong == []


def called_name(node: ast.Call) -> str:
    return ast.unparse(node.func)


def dangers(tree: ast.AST) -> list[str]:
    """Uses of what could run code from data, as `line: what`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [item.name for item in node.names]
            )
            found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in _MODULES]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in dangers_of_call(node)]
    return found


_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def dangers_of_call(node: ast.Call) -> list[str]:
    name = called_name(node)
    keywords = {item.arg: ast.unparse(item.value) for item in node.keywords}
    found = [name] if name in _CALLS else []
    if name == "torch.load" and keywords.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
        found.append("np.load with allow_pickle")
    switches = [key for key in ("shell", "trust_remote_code") if keywords.get(key, "False") != "False"]
    return found + [f"{key}={keywords[key]}" for key in switches]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib", "eval('1')", "exec('1')", "yaml.load(x)",
        "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "os.system('x')",
    ],
)  # fmt: skip
def test_the_search_for_dangers_finds_each(code):
    assert len(dangers(ast.parse(code))) == 1


def test_nothing_in_the_product_can_run_code_from_data():
    found = {
        str(path.relative_to(ROOT)): list_
        for path in source_files()
        if (list_ := dangers(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


def test_shell_scripts_pass_shellcheck():
    from shutil import which

    if which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [
        path for path in tracked_files() if path.suffix in (".sh", ".sbatch") or path == ROOT / ".ci/run"
    ]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
