"""Names, seeds, and precedence of the points of a grid, each at the edge of its rule."""

from __future__ import annotations

import pytest

from qsparse_moe.ablation.grid.load import load_grid
from qsparse_moe.errors import ConfigError
from tests.ablation.grid_files import BASE, GRID

ONE_SEED = "base: base.yaml\nseeds: [0]\n"


def refusal(path, *settings, **options):
    with pytest.raises(ConfigError) as caught:
        load_grid(path, *settings, **options)
    return str(caught.value)


def names(write, grid):
    return load_grid(write(ONE_SEED + grid)).variants


def test_a_point_has_each_seed_once_however_often_it_is_listed_and_no_other_point_gets_it(write):
    extra = "extra_seeds: [{seeds: [3, 1], points: [half, ha*]}, {seeds: [1, 7], points: [half]}]\n"
    grid = load_grid(write(GRID + extra))
    assert [run.id for run in grid.runs] == [
        *("dense-seed0", "dense-seed3"),
        *("half-seed0", "half-seed3", "half-seed1", "half-seed7"),
    ]


@pytest.mark.parametrize(("number", "listed"), [(6, "L1, L2, L3, L4, L5, L6"), (7, "L1, L2, L3, L4, L5, L6, ...")])
def test_up_to_six_points_are_listed_where_a_pattern_matches_none(write, number, listed):
    axis = f"axes: {{model.num_layers: {list(range(1, number + 1))}}}\nextra_seeds: [{{seeds: [1], points: [l1]}}]\n"
    path = write(ONE_SEED + axis)
    assert refusal(path) == (
        f'{path}: extra_seeds names "l1", which matches no point of the grid; its points are {listed}'
    )


def test_excluded_points_are_not_there_and_do_not_change_the_others(write):
    axes = "axes: {model.num_layers: [1, 2], training.beta1: [0.8, 0.9]}\n"
    assert names(write, axes + "exclude: [L1-*0.8, L2-beta1-0.9]\n") == ("L1-beta1-0.9", "L2-beta1-0.8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "exclude: [L1, L3]\n",
            'exclude names "L3", which matches no point of the grid; its points are L1, L2',
        ),
        (
            "exclude: [L1]\nextra_seeds: [{seeds: [1], points: [L1]}]\n",
            'extra_seeds names "L1", which matches no point of the grid; its points are L2',
        ),
        (
            'exclude: ["L*"]\n',
            'exclude (["L*"]) leaves no point of the grid; remove some of its names',
        ),
    ],
)
def test_an_exclusion_that_does_nothing_or_leaves_nothing_is_refused(write, more, message):
    path = write(ONE_SEED + "axes: {model.num_layers: [1, 2]}\n" + more)
    assert refusal(path) == f"{path}: {message}"


@pytest.mark.parametrize("name", ["-x", ".x", "_x", "a b", ""])
def test_a_name_begins_with_a_letter_or_a_digit(write, name):
    assert "should match pattern" in refusal(write(ONE_SEED + f'variants: {{"{name}": {{model.num_layers: 1}}}}\n'))


def test_values_are_named_as_they_are_written_in_a_grid_file(write):
    assert names(write, "axes: {model.qk_norm: [true, false]}") == ("qk_norm-true", "qk_norm-false")
    assert names(write, "axes: {data.cache_dir: [null, here]}") == ("cache_dir-null", "cache_dir-here")
    assert names(write, "axes: {model.sparsity.default: [0.5, 0]}") == ("S0.5", "S0")


def test_values_are_equal_only_if_their_types_are(write):
    path = write(ONE_SEED + "axes: {training.learning_rate: [1, 1.0]}")
    assert "learning_rate-1-seed0 and learning_rate-1.0-seed0 have the same settings" in refusal(path)
    assert "training.beta1 has the value 0.5 twice" in refusal(
        write(ONE_SEED + "axes: {training.beta1: [0.5, 0.9, 0.5]}")
    )


def test_a_variant_alone_is_named_by_all_of_its_settings_and_several_by_what_distinguishes_them(write):
    one = "variants: [{model.sparsity.default: 0.5, model.init_std: 0.1}]"
    assert names(write, one) == ("S0.5_init_std-0.1",)
    overrides = "model.sparsity.overrides: [{experts: 0, sparsity: 0.9}]"
    # The same override in all variants that have one still distinguishes them from the one that has none.
    both = ", ".join(f"{{{overrides}, model.init_std: {std}}}" for std in (0.1, 0.2))
    three = f"variants: [{both}, {{model.init_std: 0.1}}]"
    assert names(write, three) == (
        "expert-0-S0.9_init_std-0.1",
        "expert-0-S0.9_init_std-0.2",
        "init_std-0.1",
    )


def test_a_label_is_the_words_of_the_settings_unless_the_file_names_the_entry(write):
    grid = load_grid(
        write(ONE_SEED + "variants: {S0.5: {model.sparsity.default: 0.5}, mine: {model.sparsity.default: 0.7}}")
    )
    assert [run.choices[0].label for run in grid.runs] == ["S=0.5", "mine"]


@pytest.mark.parametrize(
    ("axes", "both"),
    [
        # A path, and the section that it is in, in either order; a name that only begins alike is another setting.
        ("model.sparsity: {a: {model.sparsity: {}}}, model.sparsity.default: [0.5]", "model.sparsity"),
        ("model.sparsity.default: [0.5], b: {a: {model.sparsity: {}}}", "model.sparsity.default"),
        ("model.moe.router: [softmax_topk], model.moe.router_jitter: [0.1]", None),
        ("model.moe.router_jitter: [0.1], model.moe.router: [softmax_topk]", None),
    ],
)
def test_a_setting_and_one_inside_of_it_conflict(write, axes, both):
    path = write(f"base: base.yaml\nseeds: [0]\naxes: {{{axes}}}\n")
    if both is None:
        assert len(load_grid(path).runs) == 1
    else:
        assert f" both set {both}; remove one, or join them in one axis of named settings" in refusal(path)


def test_variants_and_an_axis_that_set_the_same_path_are_both_named(write):
    path = write(GRID + "axes: {model.sparsity.default: [0.5]}\n")
    assert "variants and axes.model.sparsity.default both set model.sparsity.default; remove one" in refusal(path)


def test_common_settings_are_checked_as_those_of_variants(write):
    wrong = "settings: {training.stesp: 3, training.seed: 5}\nvariants: {a: {}}\n"
    message = refusal(write(ONE_SEED + wrong))
    assert "settings: training.stesp is not a setting; did you mean training.steps" in message
    assert "settings sets training.seed (5), which the grid sets for every run; remove it" in message


def test_the_command_line_precedes_the_point_the_point_the_grid_and_the_grid_its_base(write):
    grid = (
        "settings: {training.beta1: 0.7, training.beta2: 0.7, training.weight_decay: 0.7}\n"
        "variants: {a: {training.beta2: 0.8, training.weight_decay: 0.8}}\n"
    )
    base = BASE.replace("steps: 2,", "steps: 2, beta1: 0.6, beta2: 0.6, weight_decay: 0.6, epsilon: 0.06,")
    (run,) = load_grid(write(ONE_SEED + grid, base), ["training.weight_decay=0.9"]).runs
    training = run.config.training
    assert (training.epsilon, training.beta1, training.beta2, training.weight_decay) == (0.06, 0.7, 0.8, 0.9)


def test_a_setting_that_the_grid_gives_is_refused_with_spaces_around_it_as_well(write):
    path = write()
    assert refusal(path, [" training.name =x"]).startswith(
        f"training.name (x) is set by the grid for every run of {path}, so that no two share a folder; remove it."
    )


def test_an_error_names_the_file_and_the_variant(write):
    path = write(GRID.replace("0.5}", "1.5}"))
    assert refusal(path).startswith(f"{path}, variant half: ")


def test_sites_vary_if_the_last_variant_alone_differs_and_none_do_if_the_last_has_another_shape(write):
    third = GRID.replace("{model.sparsity.default: 0.5}", "{model.init_std: 0.1}")
    varied = load_grid(write(third + "  last: {model.sparsity.sites.expert_hidden: 0.5}\n")).varied_sites
    assert varied == ((0, "expert_hidden"),)
    other = GRID + "  last: {model.moe.num_experts: 3, model.moe.experts_per_token: 1}\n"
    assert load_grid(write(other)).varied_sites == ()


def test_an_item_of_a_list_stands_for_its_list_whatever_its_number(write):
    eleven = ", ".join(f"{{kind: stdlib, max_bytes: {200_000 + i}}}" for i in range(11))
    base = BASE.replace("[{max_bytes: 200000}]", f"[{eleven}]").replace("tensorboard: false", "hyperparameters: []")
    grid = (
        ONE_SEED
        + "axes: {data.sources.10.max_bytes: [300000], model.init_std: [0.1], "
        + "training.beta2: [0.9], training.beta1: [0.8]}\n"
    )
    (run,) = load_grid(write(grid, base)).runs
    assert run.config.metrics.hyperparameters == (
        *("data.sources", "model.init_std", "training.beta1", "training.beta2"),
    )
    assert run.config.metrics.variant == "max_bytes-300000-init_std-0.1-beta2-0.9-beta1-0.8"
