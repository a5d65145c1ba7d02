"""Histograms as TensorBoard reads them: counts between the edges of their bins."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.metrics.histograms import histogram_summary, histograms
from qsparse_moe.metrics.names import METRICS
from qsparse_moe.sparsity.log_counts import MAGNITUDES, PROBABILITIES, LogBins, log_counts
from tests.metrics.reports import random_stats

BINS = LogBins(-3, 1, 1)


def read_back(folder, values):
    writer = SummaryWriter(str(folder))
    summary = histogram_summary("h", log_counts(values, BINS), BINS)
    if summary is not None:
        writer.file_writer.add_summary(summary, 5)
    writer.close()
    board = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    board.Reload()
    return board.Histograms("h") if "h" in board.Tags()["histograms"] else []


def test_counts_are_written_between_the_edges_of_the_non_empty_bins(tmp_path):
    (event,) = read_back(tmp_path, torch.tensor([0.3, 0.4, 1.5]))
    found = event.histogram_value
    assert event.step == 5 and found.num == 3
    assert [found.min, found.max] == [-2, 1]
    counts = dict(zip(found.bucket_limit, found.bucket, strict=True))
    assert {edge: count for edge, count in counts.items() if count} == {-1: 2, 1: 1}
    assert found.sum == pytest.approx(2 * -1.5 + 0.5)


def test_thresholds_an_eighth_of_an_octave_apart_lie_in_bins_of_their_own():
    magnitudes = 2.0 ** ((torch.arange(9) + 0.5) / 8 - 3)  # one octave and an eighth: half octaves gave three bins
    counts = log_counts(magnitudes, MAGNITUDES)
    assert counts[counts > 0].tolist() == [1.0] * 9
    assert [MAGNITUDES.edges[i] for i in counts.nonzero().flatten()] == [-3 + i / 8 for i in range(9)]
    assert log_counts(2.0 ** torch.tensor([-2.03, -2.2, -2.3]), PROBABILITIES).max() == 1


def test_an_empty_histogram_is_not_written(tmp_path):
    assert not read_back(tmp_path, torch.empty(0))


def test_every_layer_that_has_the_site_has_a_histogram():
    model = ModelConfig(num_layers=3, moe=MoEConfig(num_dense_layers=1, num_shared_experts=1))
    found = {
        name: (counts_LH, layers, bins) for name, counts_LH, layers, bins in histograms(random_stats(model), model)
    }
    layers = {name: tuple(numbers) for name, (_, numbers, _) in found.items()}
    assert layers["router/log2_probability"] == (1, 2)
    assert layers["sparsity/attention_input/log2_threshold"] == (0, 1, 2)
    assert layers["sparsity/dense_hidden/log2_threshold"] == (0,)
    assert len(found) == 1 + 8
    for name, (counts_LH, numbers, bins) in found.items():
        assert counts_LH.shape == (len(numbers), bins.number)
        assert bins == (PROBABILITIES if name.startswith("router/") else MAGNITUDES)
    listed = {metric.name for metric in METRICS if metric.kind == "histogram"}
    assert {"/".join(("sparsity/SITE" if n.startswith("s") else "router", n.split("/")[-1])) for n in found} == listed
