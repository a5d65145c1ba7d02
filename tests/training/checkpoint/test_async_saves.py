"""Checkpoints that are written while training goes on: what they contain, and what a failure of one does."""

from __future__ import annotations

import pathlib
import shutil
import threading
from unittest import mock

import pytest
import torch

from qsparse_moe.errors import CheckpointError
from qsparse_moe.training.checkpoint import save as save_module
from qsparse_moe.training.checkpoint import snapshot
from qsparse_moe.training.checkpoint.save import CheckpointWriter, _describe_parameters
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints, newest_checkpoint
from qsparse_moe.training.flat_range import FlatRange
from tests.training.checkpoint.small_checkpoints import make_biased, make_engine, names, progress, save, the_file

FULL = OSError(28, "No space left on device")


class Disk:
    """A disk that writes nothing until ``release`` is called, and then as ``error`` says."""

    def __init__(self, monkeypatch):
        self.released, self.begun, self.error = threading.Event(), threading.Event(), None
        write = save_module.write_tensors

        def wait_and_write(*arguments):
            self.begun.set()
            assert self.released.wait(20)
            if self.error is not None:
                raise self.error
            return write(*arguments)

        monkeypatch.setattr(save_module, "write_tensors", wait_and_write)

    def release(self, error=None):
        self.error = error
        self.released.set()


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(monkeypatch)
    yield disk
    disk.release()


def make_writer(tmp_path, engine, **more):
    return CheckpointWriter(tmp_path, engine, **({"keep_last": 2, "is_async": True} | more))


def test_a_checkpoint_has_the_state_of_its_step_and_not_what_training_made_of_it_meanwhile(tmp_path, disk):
    engine = make_biased(tmp_path)
    bias = engine.model.layers[0].moe.router.expert_bias
    monitor = {"rows": torch.tensor([1, 2]), "steps": 3}
    writer = make_writer(tmp_path, engine)
    before = {name: engine.held(name, "weight").clone() for name in engine.shapes()}
    random = torch.get_rng_state()
    path = writer.save(progress(1), {"step": 1}, save_module.ReportState(monitor=monitor))
    assert disk.begun.wait(20) and not path.exists()
    torch.rand(3)
    for name in engine.shapes():
        engine.held(name, "weight").add_(1)
    bias.add_(1)
    monitor["rows"].add_(1)
    disk.release()
    writer.finish()
    checkpoint = Checkpoint(path)
    assert all(checkpoint.tensor("weight", name).flatten().equal(before[name]) for name in before)
    assert checkpoint.buffer("layers.0.moe.router.expert_bias").equal(bias - 1)
    assert checkpoint.random_states(0)["torch"].equal(random)
    found = checkpoint.report_state(0).monitor
    assert found["rows"].tolist() == [1, 2] and found["steps"] == 3


def test_a_save_waits_for_the_one_before_and_uses_its_memory_again(tmp_path, engine, disk):
    writer = make_writer(tmp_path, engine)
    buffer = writer._snapshot._buffer.data_ptr()
    writer.save(progress(1), {})
    engine.held("head.weight", "weight").fill_(2)
    second = threading.Thread(target=writer.save, args=(progress(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and names(tmp_path) == []
    disk.release()
    second.join()
    writer.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    first, last = (Checkpoint(path).tensor("weight", "head.weight") for path in list_checkpoints(tmp_path))
    assert not (first == 2).any() and (last == 2).all()
    assert writer._snapshot._buffer.data_ptr() == buffer


def test_a_disk_that_fills_in_the_background_is_one_error_and_leaves_the_earlier_checkpoint(tmp_path, engine, disk):
    writer = make_writer(tmp_path, engine)
    disk.release()
    writer.save(progress(1), {})
    writer.finish()
    disk.error = FULL
    writer.save(progress(2), {})
    writer._thread.join()
    with pytest.raises(
        CheckpointError, match=r"step-00000002: cannot be written \(No space left on device\); .* intact"
    ):
        writer.finish()
    # Once: the run goes on, and may save again.
    writer.finish()
    assert newest_checkpoint(tmp_path).progress.step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    disk.error = None
    writer.save(progress(3), {})
    writer.finish()
    assert newest_checkpoint(tmp_path).progress.step == 3


def test_after_a_failure_that_nobody_has_asked_for_yet_the_next_save_is_tried(tmp_path, engine, disk):
    """There may be space again, and the run ends with the error of the first one in any case."""
    writer = make_writer(tmp_path, engine)
    disk.release(FULL)
    writer.save(progress(1), {})
    writer._thread.join()
    disk.error = None
    writer.save(progress(2), {})
    with pytest.raises(CheckpointError, match=r"step-00000001: cannot be written"):
        writer.finish()
    assert names(tmp_path) == ["step-00000002"]


def test_an_error_of_any_other_kind_is_one_too_and_the_log_has_its_traceback(tmp_path, engine, disk, caplog):
    writer = make_writer(tmp_path, engine)
    disk.release(ArithmeticError("odd"))
    writer.save(progress(1), {})
    with pytest.raises(CheckpointError, match=r"step-00000001: cannot be written \(ArithmeticError\('odd'\)\)"):
        writer.finish()
    assert "Traceback" in caplog.text


def test_a_run_that_lost_its_folder_while_it_wrote_publishes_nothing(tmp_path, engine, disk):
    """The other run has removed the folder that was being written, so that writing fails as well."""
    lost = []

    def check():
        if lost:
            raise CheckpointError("was taken over by process 7")

    writer = make_writer(tmp_path, engine, check_folder=check)
    disk.release()
    writer.save(progress(1), {})
    writer.finish()
    disk.released.clear()
    writer.save(progress(2), {})
    assert disk.begun.wait(20)
    lost.append(True)
    for partial in (tmp_path / "checkpoints").glob(".saving-*"):
        shutil.rmtree(partial)
    disk.release()
    with pytest.raises(CheckpointError, match="taken over by process 7"):
        writer.finish()
    with pytest.raises(CheckpointError, match="taken over by process 7"):
        writer.save(progress(3), {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_two_runs_that_write_the_same_step_never_publish_files_of_each_other(tmp_path, engine, disk):
    one, other = make_writer(tmp_path, engine), make_writer(tmp_path, engine)
    one.save(progress(1), {"run": 1})
    other.save(progress(1), {"run": 2})
    folders = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert len(folders) == 2 and all(name.startswith(".saving-step-00000001-") for name in folders)
    disk.release()
    one._thread.join()
    other._thread.join()
    assert newest_checkpoint(tmp_path).data_state in ({"run": 1}, {"run": 2})


def test_a_writer_that_is_closed_finishes_what_it_has_begun_and_names_it(tmp_path, engine, disk, caplog):
    writer = make_writer(tmp_path, engine)
    path = writer.save(progress(1), {})
    threading.Timer(0.1, disk.release).start()
    writer.close()
    assert newest_checkpoint(tmp_path).progress.step == 1
    assert f"the newest complete checkpoint is {path}" in caplog.text


def test_a_copy_that_does_not_fit_into_memory_is_refused_before_training(tmp_path, engine):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with (
        mock.patch.object(snapshot.torch, "empty", side_effect=error),
        pytest.raises(
            CheckpointError, match=r"checkpoint_async \(true\) needs .* GB of host memory .* 9 bytes.*=false"
        ),
    ):
        make_writer(tmp_path, engine)
    assert make_writer(tmp_path, engine, is_async=False)._snapshot is None


def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_named(tmp_path, engine):
    path = save(tmp_path, engine, 1)
    checkpoint = Checkpoint(path)
    save(tmp_path, engine, 2, keep_last=1)
    with pytest.raises(
        CheckpointError, match=rf"{path}: was removed while it was read; .*keep_last.* names the newest"
    ):
        checkpoint.tensor("weight", "head.weight")
    with pytest.raises(CheckpointError, match=rf"{path}: was removed while it was read"):
        Checkpoint(path)


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps").exists(), reason="needs Linux's list of mapped pages")
def test_only_the_range_that_is_asked_for_is_read(tmp_path):
    big = make_engine(tmp_path, 0, model={"hidden_size": 1200, "num_layers": 1})
    checkpoint = Checkpoint(save(tmp_path, big, 1))
    size = the_file(tmp_path).stat().st_size
    assert size > 10e6
    values = checkpoint.read("exp_avg", "head.weight", 100_000, 300_000)
    assert values.equal(big.held("head.weight", "exp_avg")[100_000:300_000])
    # The system reads whole pages, and up to 16 of them around each.
    assert 800_000 <= resident_bytes_of(the_file(tmp_path)) < 1_200_000


def resident_bytes_of(file):
    lines = pathlib.Path("/proc/self/smaps").read_text().splitlines()
    at = [index for index, line in enumerate(lines) if line.endswith(str(file))]
    return sum(
        1024 * int(line.split()[1]) for index in at for line in lines[index : index + 6] if line.startswith("Rss:")
    )


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 4), (5, 8)],
        [(0, 5), (4, 8)],
        [(0, 4), (4, 7)],
        [(1, 4), (4, 8)],
    ],
)
def test_an_index_whose_ranges_leave_a_gap_or_overlap_is_an_internal_error(ranges):
    shapes = {"weight": torch.Size((2, 4))}
    with pytest.raises(AssertionError, match="weight: "):
        _describe_parameters(shapes, [{"weight": FlatRange(*one)} for one in ranges])


def test_the_index_names_the_ranges_in_order_with_the_rank_that_saves_each():
    shapes = {"weight": torch.Size((2, 4)), "norm": torch.Size((3,))}
    of_ranks = [{"weight": FlatRange(5, 8)}, {"weight": FlatRange(0, 5), "norm": FlatRange(0, 3)}]
    assert _describe_parameters(shapes, of_ranks) == {
        "weight": {"shape": [2, 4], "ranges": [(0, 5, 1), (5, 8, 0)]},
        "norm": {"shape": [3], "ranges": [(0, 3, 1)]},
    }
