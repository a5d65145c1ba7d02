"""Requirements of NVMe offload; layouts with offload to host memory are tested in tests/distributed."""

from __future__ import annotations

import re

import pytest

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.runs.folder import run_folder
from qsparse_moe.training.engines import offload
from qsparse_moe.training.engines.build import check_engine
from qsparse_moe.training.engines.offload import check_alignment, check_offload, remove_swap_files, swap_folder
from qsparse_moe.training.loop import train

WAY_OUT = "install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora, RHEL), or offload to cpu"


def nvme(make_config, folder, **training):
    chosen = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(folder)}
    return make_config(engine="deepspeed", deepspeed=chosen, **training)


def test_a_machine_without_libaio_is_refused_before_anything_is_written(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "_has_libaio", lambda: False)
    config = nvme(make_config, tmp_path)
    with pytest.raises(BackendUnavailable, match=re.escape(WAY_OUT)):
        train(config)
    assert not run_folder(config).exists()


def test_a_missing_folder_is_named_before_anything_is_written(make_config, tmp_path):
    config = nvme(make_config, tmp_path / "missing")
    with pytest.raises(ConfigError, match=rf"training\.deepspeed\.nvme_path \({tmp_path}/missing\) must be .*folder"):
        train(config)
    assert not run_folder(config).exists()


@pytest.mark.parametrize("kind", ["a file", "not writable"])
def test_a_path_that_takes_no_files_is_named_before_the_compiler_is_asked(kind, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "_has_libaio", None)
    folder = tmp_path / "swap"
    folder.write_text("") if kind == "a file" else folder.mkdir()
    if kind == "not writable":
        monkeypatch.setattr(offload.os, "access", lambda path, mode: (path, mode) != (folder, offload.os.W_OK))
    with pytest.raises(ConfigError) as caught:
        check_offload(nvme(make_config, folder))
    assert str(caught.value) == (
        f"training.deepspeed.nvme_path ({folder}) must be an existing, writable folder on every machine of the run; "
        "create it, or choose another folder"
    )


def test_swap_files_are_below_the_given_folder_also_at_home_and_only_with_nvme(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = swap_folder(nvme(make_config, "~/swap"))
    assert folder.parent == tmp_path / "swap" and re.fullmatch(r"run-[0-9a-f]{8}", folder.name)
    parameters = {"zero_stage": 3, "offload_parameters": "nvme", "nvme_path": "~/swap"}
    assert swap_folder(make_config(engine="deepspeed", deepspeed=parameters)) == folder
    assert swap_folder(make_config(engine="deepspeed", deepspeed={"zero_stage": 3})) is None


def test_the_plain_engine_and_host_memory_require_nothing(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "_has_libaio", lambda: False)
    check_engine(make_config(engine="deepspeed", deepspeed={"zero_stage": 2, "offload_optimizer": "cpu"}))
    files = nvme(make_config, tmp_path)
    with pytest.raises(BackendUnavailable):
        check_engine(files)
    check_engine(files.model_copy(update={"training": files.training.model_copy(update={"engine": "torch"})}))


def test_a_gradient_that_would_be_read_back_to_a_wrong_offset_is_refused():
    partitions = {"embedding": (0, 1000), "router": (1000, 24), "experts": (1024, 5000), "head": (6024, 999)}
    check_alignment(partitions, alignment=256, smallest=1000)
    with pytest.raises(ConfigError) as caught:
        check_alignment(partitions | {"experts": (1016, 5000)}, alignment=256, smallest=1000)
    check_alignment({"head": (1016, 999)}, alignment=256, smallest=1000)
    with pytest.raises(ConfigError, match="partition of head begins at element 1016"):
        check_alignment({"head": (1016, 1000)}, alignment=256, smallest=1000)
    message = str(caught.value)
    assert (
        "training.deepspeed.offload_optimizer (nvme): the rank's partition of experts begins at element 1016" in message
    )
    assert "a multiple of 256" in message and message.endswith("or offload to cpu")


def test_each_rank_removes_its_files_and_the_last_one_the_folder(make_config, tmp_path):
    config = nvme(make_config, tmp_path)
    folder = swap_folder(config)
    for place in ("zero_stage_3/optimizer/rank0", "zero_stage_3/float32params/rank0", "zero_stage_3/optimizer/rank1"):
        (folder / place).mkdir(parents=True)
        (folder / place / "0_param.tensor.swp").write_bytes(b"x")
    remove_swap_files(config, 0)
    assert [path.name for path in folder.glob("**/rank*")] == ["rank1"]
    remove_swap_files(config, 1)
    assert list(tmp_path.glob("run-*")) == [] and tmp_path.is_dir()
    remove_swap_files(config, 1)
