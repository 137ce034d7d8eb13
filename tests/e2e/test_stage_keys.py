"""A stage of a training run runs again exactly when its code changes."""

import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

import services
import training
from cli.main import main
from services.catalog import bundle, filters
from services.embedding.encoders import encoders
from services.ranking import servicer
from services.ranking.scoring import scorer
from services.rpc import status
from tests.e2e.test_resume import command, events, items, write
from tests.support.models import make_image_encoder, make_text_encoder
from training import pipeline
from training.core.import_closure import SourceTree
from training.core.stages import Stages
from training.data import settings_file
from training.data.images import ShopImages
from training.data.readers import delimited
from training.data.shop import ShopData
from training.encoders import text_encoder
from training.evaluation import report

pytestmark = pytest.mark.usefixtures("single_thread")

ROOT = Path(services.__file__).parent.parent
PACKAGES = (services.__name__, training.__name__)
COMMAND = "cli"
OURS = (*PACKAGES, COMMAND, "analytics", "demo", "bench", "tests")
# Runs each pickled stage in a process that has loaded none of our modules, and writes which it has then.
WORKER = """
import json, os, pickle, sys, tempfile
from pathlib import Path
import lightgbm, open_clip, optuna, scipy.optimize, torch, transformers
torch.set_num_threads(1)
for path in map(Path, sys.argv[1:]):
    process = os.fork()
    if not process:
        entry, args, kwargs = pickle.loads(path.read_bytes())
        with tempfile.TemporaryDirectory() as directory:
            entry(Path(directory), *args, **kwargs)
        path.with_suffix(".json").write_text(json.dumps(sorted(sys.modules)))
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        sys.exit(f"{path.stem} failed")
"""


@dataclass(frozen=True)
class Run:
    """A training: its shop, the bases of its encoders, its output, and the entry function of each stage."""

    shop: Path
    bases: Path
    out: Path
    entries: Mapping[str, Callable[..., None]]
    modules: Mapping[str, set[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A real training; then each of its stages once more, alone, with the modules that it loads."""
    root = tmp_path_factory.mktemp("keys")
    shop, bases = write(root / "shop", items(), events()), root / "bases"
    make_text_encoder(bases / "text")
    make_image_encoder(bases / "image")
    entries: dict[str, Callable[..., None]] = {}

    class Recorder(Stages):
        def run(self, name: str, inputs: Any, entry: Callable[..., None], *args: Any, **kwargs: Any) -> Path:
            entries[name] = entry
            stage = (entry, [_without_files(value) for value in args], kwargs)
            (root / f"{name}.stage").write_bytes(pickle.dumps(stage))
            return super().run(name, inputs, entry, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Stages", Recorder)
        assert main(command(shop, bases, root / "out")) == 0
    arguments = [str(path) for path in sorted(root.glob("*.stage"))]
    subprocess.run([sys.executable, "-c", WORKER, *arguments], check=True, env=_environment(ROOT))
    modules = {
        name: {module for module in json.loads((root / f"{name}.json").read_text()) if _is_ours(module)}
        for name in entries
    }
    return Run(shop, bases, root / "out", entries, modules)


def _without_files(value: object) -> object:
    """An argument without what a shop's files were: no stage that has the whole shop reads it."""
    if isinstance(value, ShopData):
        return replace(value, reports={}, tables={}, images=cast(ShopImages, None))
    return value


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in OURS


def _environment(root: Path) -> dict[str, str]:
    paths = [str(root), str(ROOT / "protos" / "gen")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def tree_of(root: Path) -> SourceTree:
    return SourceTree({name: root / name for name in PACKAGES})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of our packages, to be edited."""
    root = tmp_path / "source"
    for name in (*PACKAGES, COMMAND):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def path_in(root: Path, module: ModuleType) -> Path:
    return root / Path(inspect.getfile(module)).relative_to(ROOT)


def test_every_module_that_a_stage_loads_is_in_its_closure(run: Run) -> None:
    tree = tree_of(ROOT)
    for name, entry in run.entries.items():
        assert run.modules[name]
        assert run.modules[name] - set(tree.closure(entry.__module__)) == set(), name


def test_a_closure_excludes_the_code_of_other_stages(run: Run) -> None:
    tree = tree_of(ROOT)
    others = {module.__name__ for module in (pipeline, report, delimited, settings_file, servicer)}
    for name, entry in run.entries.items():
        closure = set(tree.closure(entry.__module__))
        assert not closure & others, name
        if name.startswith(("text", "image", "photographs")):
            assert not any(module.startswith(f"{services.__name__}.ranking.") for module in closure), name


RANKERS = {"ranking"}
BEHAVIOR = {"graph", "sequence", "taste", "ranking", "propensity"}
ENCODERS = {
    "text", "text-vectors", "text-frozen", "text-frozen-vectors", "text-tuned-vectors", "text-head",
    "text-head-before", "text-encoder", "image", "image-vectors", "image-frozen", "image-frozen-vectors",
    "image-head", "image-head-before", "image-encoder",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "stages"),
    [
        (scorer, RANKERS),
        (filters, RANKERS),
        (bundle, {"sequence", "taste", "ranking"}),
        (encoders, ENCODERS),
        (text_encoder, {"text", "text-frozen"}),
        (pipeline, set()),
        (report, set()),
        (delimited, set()),
        (settings_file, set()),
        (servicer, set()),
        (status, set()),
    ],
)
def test_an_edit_changes_the_keys_of_the_stages_that_run_the_module(
    run: Run, copy: Path, module: ModuleType, stages: set[str]
) -> None:
    assert {*ENCODERS, *BEHAVIOR, "photographs"} == set(run.entries)
    before = {name: tree_of(copy).digest(entry.__module__) for name, entry in run.entries.items()}
    with path_in(copy, module).open("a") as file:
        file.write("\nADDITION = 1\n")
    after = {name: tree_of(copy).digest(entry.__module__) for name, entry in run.entries.items()}
    assert {name for name in before if after[name] != before[name]} == stages


def test_an_edit_of_the_scoring_runs_only_the_rankers_again(run: Run, copy: Path) -> None:
    for path in copy.rglob("*.py"):  # a comment runs nothing again
        path.write_text(f"{path.read_text()}\n# A comment.\n")
    assert _rerun(run, copy) == set()
    path = path_in(copy, scorer)
    column = 'return f"ctr_{event_type}"'
    assert column in path.read_text()
    path.write_text(path.read_text().replace(column, 'return f"ctr_{event_type}_logit"'))
    assert _rerun(run, copy) == RANKERS
    assert _rerun(run, copy) == set()


def _rerun(run: Run, root: Path) -> set[str]:
    """The stages that a training by the code under `root` runs, where those of `run` are."""
    result = subprocess.run(
        [sys.executable, "-m", "cli.main", *command(run.shop, run.bases, run.out)],
        check=True,
        env=_environment(root),
        cwd=root,
        capture_output=True,
        text=True,
    )
    lines = (result.stdout + result.stderr).splitlines()
    assert any("unchanged" in line for line in lines), lines
    return {line.partition(": done in")[0].split()[-1] for line in lines if ": done in" in line}


def test_a_key_names_its_entry_and_refuses_other_packages(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    assert stages.code(text_encoder.save_frozen) != stages.code(text_encoder.fine_tune)
    with pytest.raises(ValueError, match="is not a module of"):
        stages.run("s", [], shutil.rmtree)
