"""Records and weights on disk: whole or not there, and never guessed at."""

from __future__ import annotations

import errno
import json

import pytest

from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.runs import execute
from benchmarks.paper.schedule import missing
from benchmarks.paper.setting import preset
from benchmarks.paper.store import Store, read_records


@pytest.fixture(scope="module")
def done():
    """The first two runs of Fig. 1 in one epoch: (run, record, weights)."""
    import dataclasses

    from benchmarks.paper.recipe import Recipe

    setting = dataclasses.replace(preset("smoke"), recipe=Recipe(epochs=1, batch_size=405))
    runs = list(EXPERIMENTS["sequential"].plan(setting).values())
    first, weights = execute(runs[0], save=True)
    second, more = execute(runs[1], weights, save=True)
    return runs, [(first, weights), (second, more)]


def test_teachers_come_first_and_lost_weights_are_made_again(done, tmp_path, capsys):
    runs, ((first, _), (second, more)) = done
    with Store(tmp_path) as store:
        assert [run.key for run in missing(reversed(runs), store)] == [run.key for run in runs]
        store.add(first)
        store.add(second)
        assert missing(runs[1:2], store) == []
        assert [run.key for run in missing(runs, store)] == [run.key for run in runs]  # generation 2 needs weights
        store.add(second, more)
        assert [run.key for run in missing(runs, store)] == [runs[2].key]
        assert store.weights(runs[1].key) == more
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [0, 1, 200, None])
def test_broken_weights_are_named_and_made_again(cut, done, tmp_path, capsys):
    runs, (_, (second, more)) = done
    with Store(tmp_path) as store:
        store.add(second, more)
        path = tmp_path / "checkpoints" / f"{runs[1].key}.pt"
        middle = len(more) // 2
        flipped = more[:middle] + bytes([more[middle] ^ 255]) + more[middle + 1 :]
        path.write_bytes(flipped if cut is None else more[: cut and -cut])
        assert runs[1].key in [run.key for run in missing(runs, store)]
    assert f"{path} is broken" in capsys.readouterr().err


def test_two_commands_do_not_write_to_one_folder(tmp_path):
    with Store(tmp_path), pytest.raises(ValueError, match=r"another command is writing to .*another --out"):
        Store(tmp_path)
    with Store(tmp_path) as store:
        assert store.records == {}


def test_a_broken_store_is_not_guessed_at(done, tmp_path):
    record = json.dumps(done[1][0][0])
    (tmp_path / "runs.jsonl").write_text(f"{record}\nnonsense\n{record}\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2, is no record of a run"):
        Store(tmp_path)


@pytest.mark.parametrize("field", ["key", "test", "data_digest", "curve", "seconds", "hardware", ("validation", "nll")])
def test_a_record_without_a_field_is_named(field, done, tmp_path):
    record = json.loads(json.dumps(done[1][0][0]))
    parent, name = (record, field) if isinstance(field, str) else (record[field[0]], field[1])
    del parent[name]
    (tmp_path / "runs.jsonl").write_text(f"{json.dumps(done[1][1][0])}\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=rf"runs\.jsonl, line 2, is no record of a run \(it has no '{name}'\); remove"):
        Store(tmp_path)


def test_half_a_line_is_dropped(done, tmp_path):
    first = done[1][0][0]
    line = json.dumps(first)
    (tmp_path / "runs.jsonl").write_text(f'{line}\n{{"key": "half')
    assert list(read_records(tmp_path / "runs.jsonl")) == [first["key"]]
    with Store(tmp_path) as store:
        assert list(store.records) == [first["key"]]
        store.add(done[1][1][0])
    assert len(read_records(tmp_path / "runs.jsonl")) == 2


def test_a_full_disk_leaves_no_half_of_a_file(done, tmp_path, monkeypatch):
    first, weights = done[1][0]

    def no_room(self, *arguments, **options):
        file = open_(self, *arguments, **options)
        if self.suffix == ".part":
            file.close()
            return open_(type(self)("/dev/full"), *arguments, **options)
        return file

    with Store(tmp_path) as store:
        open_ = type(tmp_path).open
        monkeypatch.setattr(type(tmp_path), "open", no_room)
        with pytest.raises(OSError, match="No space left") as error:
            store.add(first, weights)
        assert error.value.errno == errno.ENOSPC
        assert store.records == {}
        assert list(store.checkpoints.iterdir()) == []
