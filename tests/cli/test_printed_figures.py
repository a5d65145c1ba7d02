"""Figures that verbs print, written out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console

from qsparse_moe.cli import evaluate, fit_law
from qsparse_moe.cli.generated_text import Settings, _shown_starts, report_speed
from qsparse_moe.cli.grid_progress import GridProgress
from qsparse_moe.inference import row_costs
from qsparse_moe.inference.generator import Statistics
from qsparse_moe.training.evaluate import Evaluation


def cells(text):
    return [[cell.strip() for cell in line.split("│")][1:-1] for line in text.splitlines()]


def test_an_evaluation_is_compared_with_the_unigram_model(capsys):
    found = Evaluation(
        step=7, rows=3, loss=1.25, perplexity=3.4903, bits_per_byte=1.5, unigram_bits_per_byte=4.0, sparsity=0.625
    )
    evaluate._print_figures(found, ())
    assert [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()] == [
        ["after", "step", "7, on 3 validation sequences"],
        ["mean", "S", "0.6250"],
        ["loss", "1.2500", "nats per token"],
        ["perplexity", "3.490"],
        ["bits", "per", "byte     1.5000"],
        ["unigram", "model", "4.0000; the model has 0.375 times as many bits"],
    ]


def test_the_statistics_of_a_generation_are_rates_of_each_part(capsys, monkeypatch):
    statistics = Statistics("native", prompt_tokens=12, cache_bytes=4096)
    statistics.prefill_seconds, statistics.decode_seconds = 0.5, 4.0
    statistics.decode_tokens, statistics.decode_steps = 30, 10
    stream = SimpleNamespace(
        statistics=statistics, engine=SimpleNamespace(name="native", figures=lambda: {"bytes_read": 12345})
    )
    monkeypatch.setattr(row_costs, "known_read_bandwidth", lambda: 1e5)
    report_speed(stream, SimpleNamespace(with_stats=True))
    assert [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()] == [
        "engine native",
        "key-value cache 4,096 bytes",
        "prefill 12 tokens in 0.500 s, 24.0 tokens/s",
        "decode 30 tokens in 4.000 s, 7.5 tokens/s",
        "bytes read 12,345",
        # 12,345 bytes at 1e5 per second, in steps of 0.4 s.
        "share of the limit 0.31 of a read bandwidth of 0.0 GB/s",
    ]
    statistics.reused_tokens = 10
    report_speed(stream, SimpleNamespace(with_stats=True))
    assert " ".join(capsys.readouterr().err.split("\n")[2].split()) == "prefill 2 tokens in 0.500 s, 4.0 tokens/s"
    stream.engine.name = "triton"
    report_speed(stream, SimpleNamespace(with_stats=True))
    assert "limit" not in capsys.readouterr().err
    report_speed(stream, SimpleNamespace(with_stats=False))
    assert capsys.readouterr().err == "" and "with_stats" in Settings.__annotations__


def test_the_progress_of_a_grid_names_the_run_with_the_fewest_bits(capsys):
    with GridProgress(4) as progress:
        for name, bits, error in (("a", 2.5, None), ("b", None, "exit code 1"), ("c", 2.25, None), ("d", 2.75, None)):
            progress(SimpleNamespace(id=name, bits_per_byte=bits, error=error))
    assert capsys.readouterr().err.splitlines() == [
        "1/4  a  2.5000 bits per byte  best a 2.5000 bits per byte",
        "2/4  b  exit code 1  best a 2.5000 bits per byte",
        "3/4  c  2.2500 bits per byte  best c 2.2500 bits per byte",
        "4/4  d  2.7500 bits per byte  best c 2.2500 bits per byte",
    ]


def test_tables_of_laws_have_percentages_and_mark_what_lies_beyond_the_runs(capsys):
    best = {
        "expert_share": 0.25,
        "sparsity": 0.8125,
        "interval": [0.75, 0.875],
        "band": [0.5, 0.9],
        "band_interval": [0.25, 0.95],
        "dense_excess": 0.125,
        "worse_than_dense_beyond": 0.9375,
        "at_edge_share": 0.4,
    }
    constants = {"alpha": {"value": 0.123456, "interval": [0.1, 0.2], "printed": 0.15}}
    form = {"constants": constants, "printed_unit": "bits per token", "optima": [best]}
    form |= {"fit_error": 0.0123, "held_out_error": 0.0234, "largest_held_out_error": None}
    form["longest_held_out_error"] = 0.0345
    other = form | {"optima": [best | {"expert_share": None, "sparsity": 0.75, "worse_than_dense_beyond": None}]}
    summary = {
        "forms": {"product": form, "kept": other},
        "best": "kept",
        "level": 0.9,
        "tolerance": 0.02,
        "ranges": {"sparsity": [0.0, 0.8]},
        "printed": {"sparsity": 0.5, "rounding": (0.4, 0.6), "band": (0.3, 0.7)},
    }
    console = Console(width=200)
    console.print(fit_law._forms_table(summary))
    shown = cells(capsys.readouterr().out)
    assert ["product", "1", "1.23%", "2.34%", "–", "3.45%"] in shown
    assert ["kept *", "1", "1.23%", "2.34%", "–", "3.45%"] in shown
    console.print(fit_law._constants_table(form, summary))
    assert ["alpha", "0.1235", "0.1 to 0.2", "0.15"] in cells(capsys.readouterr().out)
    console.print(fit_law._optimum_table(summary))
    rows = {(row[0], row[1]): row[2:] for row in cells(capsys.readouterr().out) if len(row) == 9}
    assert rows["product", "0.25"] == [
        "0.812 !", "0.750–0.875", "0.500–0.900", "0.250–0.950", "12.50%", "0.938", "40%",
    ]  # fmt: skip
    assert rows["kept", "any"][0] == "0.750" and rows["kept", "any"][5] == "–"
    assert rows["q-sparse, printed", "any"][:3] == ["0.500", "0.400–0.600", "0.300–0.700"]


@pytest.mark.parametrize(("overlong", "shown"), [("truncate", ["cdef", "xy", ""]), ("slide", ["abcdef", "xy", ""])])
def test_the_text_before_an_answer_is_the_end_of_the_prompt_that_the_model_reads(overlong, shown):
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(chr(i) for i in ids if i))
    encode = lambda text: [0, *map(ord, text)]  # noqa: E731
    generator = SimpleNamespace(encode=encode, tokenizer=tokenizer, overlong=overlong, max_length=4)
    assert _shown_starts(generator, ["abcdef", "xy", ""]) == shown
