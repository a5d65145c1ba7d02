"""The figure of a decode benchmark shows the numbers of its JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsparse_moe.bench import decode_figure
from qsparse_moe.bench.decode_figure import Speed, draw, speeds_by_format

ROOT = Path(__file__).parents[2]


def row(contender, batch, seconds):
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "contender": contender,
        "batch": batch,
        "seconds_by_round": seconds,
        "tokens_per_second": batch * 8 / median,
    }


RESULT = {
    "shape": {"tokens": 8},
    "formats": {
        "bf16": {
            "head": "bf16",
            "decode": [
                row("ours S 0.5", 1, [0.25, 0.5, 0.125]),
                row("ours S 0", 1, [0.5, 0.5, 1.0]),
                row("llama.cpp BF16, output BF16", 1, [0.5, 0.4, 0.4]),
                row("transformers", 1, [2.0, 2.0, 2.0]),
                row("ours S 0", 4, [1.0, 1.0, 1.0]),
            ],
        },
        "int8": {"decode": [row("ours S 0", 1, [0.25, 0.25, 0.25])]},
    },
}


def test_speeds_are_those_of_one_sequence_with_their_range_over_the_rounds():
    bf16, int8 = speeds_by_format(RESULT)
    assert (bf16.title, int8.title) == ("weights in bf16, head in bf16", "weights in int8")
    assert list(bf16.ours.items()) == [(0.0, Speed(16, 8, 16)), (0.5, Speed(32, 16, 64))]
    assert list(bf16.peers.items()) == [("transformers", Speed(4, 4, 4)), ("llama.cpp BF16, output BF16", (20, 16, 20))]
    assert (int8.ours, int8.peers) == ({0.0: Speed(32, 32, 32)}, {})
    assert speeds_by_format(RESULT, batch=4)[0].ours == {0.0: Speed(32, 32, 32)}


def test_each_line_has_its_values_and_its_name():
    axes = draw(speeds_by_format(RESULT)).axes
    assert [axis.get_title() for axis in axes] == ["weights in bf16, head in bf16", "weights in int8"]
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    ours = lines.pop("ours")
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([0.0, 0.5], [16, 32])
    assert {name: line.get_ydata()[0] for name, line in lines.items()} == {
        "ours without zeros (S 0)": 16,
        "transformers": 4,
        "llama.cpp BF16, output BF16": 20,
    }
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["ours", *lines]
    corners = axes[0].collections[0].get_paths()[0].vertices.tolist()
    assert [0.5, 64.0] in corners and [0.5, 16.0] in corners and [0.0, 8.0] in corners
    assert axes[0].get_ylim()[0] == 0


def test_one_command_draws_the_stored_results_side_by_side(tmp_path):
    files = [
        ROOT / "results" / "bench" / name for name in ("decode-cpu-family25.json", "decode-ternary-cpu-family25.json")
    ]
    images = [tmp_path / "decode.png", tmp_path / "decode.svg"]
    decode_figure.main([*map(str, files), *map(str, images)])
    assert images[0].read_bytes().startswith(b"\x89PNG") and "<svg" in images[1].read_text()
    assert all(title in images[1].read_text() for title in ("weights in bf16", "weights in int8", "weights in ternary"))
    for file in files:
        written = json.loads(file.read_text())
        stored = speeds_by_format(written)
        by_hand = {
            (name, row["contender"]): row["tokens_per_second"]
            for name, measured in written["formats"].items()
            for row in measured["decode"]
            if row["batch"] == 1
        }
        assert [len(one.ours) for one in stored] == [6] * len(written["formats"])
        first = next(iter(written["formats"]))
        assert stored[0].ours[0.5].median == by_hand[first, "ours S 0.5"]


@pytest.mark.parametrize("arguments", [[], ["one.json"], ["one.png", "two.svg"]])
def test_the_figure_needs_a_result_and_an_image(arguments):
    with pytest.raises(SystemExit, match="usage: python -m qsparse_moe.bench.decode_figure"):
        decode_figure.main(arguments)
