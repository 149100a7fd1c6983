"""What the command line says: bad options, what is missing, folders it cannot write to, and what it would do."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.paper import __main__ as command
from benchmarks.paper.data import DataSpec, load
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.setting import preset
from benchmarks.paper.store import Store

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "0"], "width must be at least 1, got 0"),
        (["--dataset", "folder", "--data-dir", ".", "--size", "0"], "size must be at least 8, got 0"),
        (["--dataset", "fashion-pairs", "--size", "0"], "size must divide 28, got 0"),
        (["--lr", "nan"], "argument --lr: must be a finite number, got nan"),
        (["--lr", "inf"], "argument --lr: must be a finite number, got inf"),
        (["--lr", "0"], "lr must be above 0 and finite, got 0"),
        (["--lr-factor", "-1"], "lr_factor must be above 0 and finite, got -1"),
        (["--momentum", "1"], "momentum must be at least 0 and below 1, got 1"),
        (["--weight-decay=-1e-4"], "weight_decay must be at least 0 and finite, got -0.0001"),
        (["--padding", "-1"], "padding must be at least 0, got -1"),
        (["--milestones", "0.5,1.5"], "milestones must be fractions between 0 and 1, got (0.5, 1.5)"),
        (["--ema-decay", "1"], "ema_decay must be at least 0 and below 1, got 1"),
        (["--temperatures", "1/0"], "argument --temperatures: cannot divide by 0, got 1/0"),
        (["--temperatures", "1,2,inf"], "argument --temperatures: must be a finite number, got inf"),
        (["--temperatures", "1/,2,3"], "argument --temperatures"),
        (["--student-alphas", "2"], "student_alphas must be 1 or more numbers from 0 to 1, got 2"),
        (["--beta-alphas", "0.9"], "beta_alphas must be from 0 to below 0.85, got 0.9"),
        (["--true-classes", "0.3"], "true_classes must be above 0.6, below 1 and not 0.85, got 0.3"),
        (["--data-dir", "somewhere"], "--data-dir is for data sets of files; digits comes with a package"),
        (["--label-noise", "1"], "label_noise must be at least 0 and below 1, got 1.0"),
        (["--dataset", "words", "--padding", "1"], "padding and flip are for pictures, not for words"),
        (["--dataset", "words", "--flip"], "padding and flip are for pictures, not for words"),
        (["--dataset", "words", "--model", "densenet40"], "model must be one of resnet8, resnet20, resnet56, resnet18"),
        (["--scheduler", "nowhere", "--workers", "2"], "--workers is for processes of this machine"),
        (["--scheduler", "nowhere"], "must be an address like tcp://host:8786 or a scheduler file, got nowhere"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        command.main(["comparison", "--preset", "smoke", *arguments, "--out", str(tmp_path / "out")])
    assert status.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "dataset"),
    [*((module, "words") for module in ("distributed", "matplotlib", "tqdm", "wordfreq")), ("sklearn", "digits")],
)
def test_an_extra_that_is_missing_is_named_at_the_start(module, dataset, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(SystemExit):
        command.main(["comparison", "--dataset", dataset, "--out", str(tmp_path)])
    assert f"{module} must be installed: pip install -e '.[benchmarks]'" in capsys.readouterr().err


def test_help_and_checks_need_no_extra():
    """Nothing but torch and the package is imported before it is known that the rest is there."""
    script = (
        "import sys\nfor name in ('distributed', 'matplotlib', 'wordfreq', 'tqdm', 'PIL'): sys.modules[name] = None"
        "\nfrom benchmarks.paper.__main__ import main\nmain(['comparison'])"
    )
    done = run(["-c", script], ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "distributed, matplotlib, tqdm, wordfreq must be installed: pip install -e '.[benchmarks]'"
    )


def run(arguments, folder, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command.main(["comparison", "--out", str(tmp_path / "file")])
    assert f"--out must be a folder, but {tmp_path}/file is a file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=rf"{tmp_path}/file/below: Not a directory; nothing is stored"):
        command.main(["comparison", "--out", str(tmp_path / "file" / "below")])

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SystemExit, match=rf"{tmp_path}/new: Permission denied; nothing is stored"):
        command.main(["comparison", "--out", str(tmp_path / "new")])


def test_a_disk_that_is_full_in_the_middle_is_named(tmp_path, monkeypatch):
    def do(*arguments):
        raise OSError(28, "No space left on device", str(tmp_path / "runs.jsonl"))

    monkeypatch.setattr(command, "do", do)
    monkeypatch.setattr(command, "local", lambda workers: pytest.MonkeyPatch().context())
    with pytest.raises(SystemExit, match=r"runs\.jsonl: No space left on device; nothing is stored"):
        command.main(["pruned", "--preset", "smoke", "--out", str(tmp_path)])


@pytest.fixture
def made_up(tmp_path):
    """A store with a made-up record of the first run of Fig. 9."""
    plan = EXPERIMENTS["pruned"].plan(preset("smoke"))
    with Store(tmp_path / "out") as store:
        for run in list(plan.values())[:1]:
            metrics = dict.fromkeys(("accuracy", "ece", "nll", "uncertainty", "diversity"), 1.0)
            curve = {"count": [1], "confidence": [0.5], "accuracy": [0.5], "edges": [0.0, 1.0]}
            record = {"key": run.key, **run.config(), **dict.fromkeys(("train", "validation", "test"), metrics)}
            record |= {"curve": curve, "soft_labels": {}, "epochs": [], "seconds": 7.2, "versions": {}}
            record |= {"data_digest": load(DataSpec("digits")).digest(), "hardware": command.estimate.hardware("cpu")}
            store.add(record)
    return tmp_path / "out", record


def test_dry_run(made_up, capsys):
    out, _ = made_up
    before = sorted(out.rglob("*"))
    arguments = ["pruned", "--preset", "smoke", "--out", str(out), "--dry-run", "--workers", "2"]
    with Store(out):  # another command may be at work
        command.main(arguments)
    printed = capsys.readouterr().out
    assert "8 runs; 1 are stored" in printed
    assert "  3 x cross-entropy  on digits with resnet8\n" in printed
    hours = 7.2 / 3600  # per run
    assert f": {7 * hours:.2g} for 7 runs; {3.5 * hours:.2g} by 2 processes" in printed
    assert "disk: records 18.2 kB, weights of teachers" in printed
    assert sorted(out.rglob("*")) == before
    command.main([*arguments, "--model", "resnet20"])
    assert "no estimate for 8 runs (8 of resnet20 on digits): no such run on" in capsys.readouterr().out
    nowhere = out / "nowhere"
    command.main([*arguments[:3], "--out", str(nowhere), "--dry-run", "--device", "cuda"])
    assert "8 runs; 0 are stored" in capsys.readouterr().out
    assert not nowhere.exists()


def test_the_page_says_what_a_dry_run_says(tmp_path, capsys):
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    rows = re.findall(r"^\| `(.*)` \| (\d+) \| (.*?) \| (.*?) ?\|$", page, re.MULTILINE)
    assert len(rows) == 6
    for words, runs, weights, images in rows:
        command.main([*["--preset", "paper"], *words.split(), "--dry-run", "--out", str(tmp_path / "none")])
        printed = capsys.readouterr().out
        assert printed.startswith(f"{runs} runs; 0 are stored"), words
        assert f"weights of teachers {weights}" in printed
        assert f"decoded images {images}" in printed if images else "decoded images" not in printed


def test_the_first_line_says_what_will_run_and_how_long(made_up, capsys):
    out, record = made_up
    store = Store(out, read_only=True)
    runs = [EXPERIMENTS["pruned"].plan(preset("smoke"))["cross-entropy"].repeated(seed) for seed in range(1, 40)]
    seconds = command.estimate.announce(runs, store, 2)
    assert seconds.startswith("39 networks (resnet8 on digits, 39 seeds) on 2 processes: about ")
    assert f"about {39 * 7.2 / 2 / 60:.0f} minutes; Ctrl-C keeps what is done" in seconds
    store.records[record["key"]] = {**record, "cpu_seconds": 72.0}  # of a run that had the processor to itself
    assert f"about {39 * 72 / 2 / 60:.0f} minutes" in command.estimate.announce(runs, store, 2)
    assert command.estimate.announce([], store, 2) == "every run is stored; nothing is trained"


def test_stored_runs_of_another_copy_of_the_data_are_found_before_training(made_up, capsys):
    out, record = made_up
    (out / "runs.jsonl").write_text(json.dumps({**record, "data_digest": "0" * 16}) + "\n")
    with pytest.raises(SystemExit):
        command.main(["pruned", "--preset", "smoke", "--out", str(out)])
    assert "made on another copy of digits (digest 0000000000000000, this one has" in capsys.readouterr().err


def test_tables_are_utf_8_in_any_locale(tmp_path):
    """Made anew of the committed runs, where neither files nor the terminal are UTF-8 by default."""
    committed = ROOT / "benchmarks" / "results" / "paper" / "laptop-digits"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs.jsonl").write_bytes(gzip.decompress((committed / "runs.jsonl.gz").read_bytes()))
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = run(["-m", "benchmarks.paper", "pruned", "--dataset", "digits", "--out", "out"], tmp_path, **locale)
    assert done.returncode == 0, done.stderr
    assert "mean over seeds ? half-width" in done.stdout
    table = (tmp_path / "out" / "pruned" / "table.md").read_text("utf-8")
    table = table.replace("paper pruned --dataset", "paper all --dataset")
    assert table == (committed / "pruned" / "table.md").read_text("utf-8")
    assert "±" in table
