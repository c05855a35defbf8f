"""pyproject.toml, environment.yml, the constraints and the Makefile say the same; importing the library costs nothing."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moa_lab.commands.doctor import MIN_PYTHON, NEEDED_VERSIONS
from moa_lab.presets import PRESETS
from moa_lab.studies.scale import SKETCH, scale_of

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What conda-forge calls differently.
CONDA_NAMES = {"pytorch": "torch", "huggingface-hub": "huggingface-hub", "python-kaleido": "kaleido"}


def requirements(*extras: str) -> dict[str, Requirement]:
    """Dependencies of the project and of `extras`, by canonical name."""
    optional = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in optional[extra])]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def conda_lines() -> list[str]:
    text = (ROOT / "environment.yml").read_text()
    return [line.strip()[2:] for line in text.partition("dependencies:")[2].splitlines() if line.strip().startswith("- ")]


def conda_requirements() -> dict[str, Requirement]:
    found = [Requirement(line.partition("#")[0].strip()) for line in conda_lines()]
    named = {canonicalize_name(requirement.name): requirement for requirement in found}
    return {CONDA_NAMES.get(name, name): requirement for name, requirement in named.items()}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def python_in_a_new_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)


def test_conda_users_get_the_same_packages_and_versions() -> None:
    conda = {name: str(requirement.specifier) for name, requirement in conda_requirements().items() if name not in ("python", "pip")}
    assert conda == {name: str(requirement.specifier) for name, requirement in requirements("lab", "eval", "dev").items()}


def test_every_conda_line_gives_its_reason() -> None:
    reasons = [line.partition("#")[2].strip() for line in conda_lines()]
    assert all(len(reason) > 10 for reason in reasons)
    assert len(set(reasons)) == len(reasons)


def test_constraints_pin_what_the_tests_install_inside_its_range() -> None:
    pinned = constraints()
    needed = requirements("dev")
    # On a machine with a GPU torch asks for the one Triton that it fits: a pin of ours would leave pip without an answer.
    assert set(needed) - {"triton"} <= set(pinned)
    for name, requirement in pinned.items():
        (pin,) = requirement.specifier
        assert pin.operator == "==", name
        assert name not in needed or needed[name].specifier.contains(pin.version), name


def test_one_least_python_is_named_everywhere() -> None:
    wanted = ".".join(map(str, MIN_PYTHON))
    assert PROJECT["project"]["requires-python"] == f">={wanted}"
    assert str(conda_requirements()["python"].specifier) == f">={wanted}"
    assert PROJECT["tool"]["mypy"]["python_version"] == wanted
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{wanted.replace('.', '')}"
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"version_info < \((\d+, \d+)\)", makefile) == [", ".join(map(str, MIN_PYTHON))]
    assert f"Python {wanted} or newer" in makefile


def test_kernels_are_compiled_with_the_first_triton_that_is_taken() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (oldest,) = re.findall(r"^OLDEST_TRITON := (\S+)$", makefile, flags=re.MULTILINE)
    assert f">={oldest.removesuffix('.0')}" == str(requirements("dev")["triton"].specifier)


def test_make_runs_every_study_in_a_size_for_a_cpu() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(r"^studies-quick:.*  ## \S.*\n\t\$\(BIN\)/moa-lab (.*)\n", makefile, flags=re.MULTILINE)
    words = recipe.split()
    assert words[:2] == ["study", "all"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert set(options) == {"--preset", "--work", "--out"}
    assert scale_of(options["--preset"]) is SKETCH
    assert max(PRESETS[options["--preset"]].lengths) <= 1024
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert "studies-quick" in phony.split()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_every_target_that_has_a_help_text() -> None:
    told = set(re.findall(r"^(\S+):[^#\n]*  ## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    listed = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT).stdout
    assert {line.split()[1] for line in listed.splitlines() if line.startswith("  make ")} == told


def test_the_doctor_asks_for_the_versions_of_pyproject() -> None:
    needed = requirements()
    assert {name: f">={version}" for name, version in NEEDED_VERSIONS.items()} == {
        name: str(needed[name].specifier) for name in NEEDED_VERSIONS
    }


def test_importing_the_library_loads_no_torch_no_triton_and_prints_nothing() -> None:
    done = python_in_a_new_process(
        "import sys, moa_lab\nloaded = {'torch', 'triton', 'transformers', 'plotly'} & set(sys.modules)\nassert not loaded, loaded"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


HIDE = """
import importlib, importlib.abc, pkgutil, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())

def import_all(package, *but):
    names = [module.name for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")]
    names = [name for name in names if name not in but]
    assert names
    for name in names:
        importlib.import_module(name)

"""


@pytest.mark.parametrize("package", ["search", "figures"])
def test_search_and_figures_work_where_torch_is_not_installed(package: str) -> None:
    hide = HIDE.replace("{names}", "('torch', 'transformers', 'triton', 'datasets')")
    done = python_in_a_new_process(hide + f"import_all('moa_lab.{package}')")
    assert done.returncode == 0, done.stderr


def test_every_module_but_the_kernels_imports_without_triton() -> None:
    names = "block_lists devices flash prefill prefill_kernel decode decode_kernel "
    names += "decode_warps operands codes read write drawn influence paged paged_kernel paged_warps unroll stored"
    kernels = [f"moa_lab.kernels.{name}" for name in names.split()] + ["moa_lab.serving.paged_kernels"]
    # These run in the environments of kvpress and vLLM.
    others = [f"moa_lab.presses.{name}" for name in ("harness", "kvpress_presses")]
    others += [f"moa_lab.serving.vllm.{name}" for name in ("attention", "specs")]
    done = python_in_a_new_process(HIDE.replace("{names}", "('triton', 'kvpress', 'vllm')") + f"import_all('moa_lab', *{kernels + others})")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
