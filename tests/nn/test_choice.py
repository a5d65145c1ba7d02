"""The choice among implementations: the first that can run, the reasons of those before it, and the log."""

from __future__ import annotations

import logging
from typing import NamedTuple

import pytest

from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.nn.runtime import choices_unlogged, choose


class Spec(NamedTuple):
    name: str
    reason: str | None


NO_A, NO_B, C, D = Spec("a", "no driver"), Spec("b", "no compiler"), Spec("c", None), Spec("d", None)


@pytest.mark.parametrize(
    ("requested", "specs", "chosen", "line"),
    [
        ("auto", [NO_A, NO_B, C, D], C, "x.y=auto: using c; not a: no driver; not b: no compiler"),
        ("auto", [D, NO_A, C], D, "x.y=auto: using d"),
        ("d", [NO_A, C, D], D, "x.y=d: using d"),
    ],
)
def test_the_first_that_can_run_or_the_requested_one_is_chosen_and_logged(requested, specs, chosen, line, caplog):
    with caplog.at_level(logging.INFO, "qsparse_moe.nn.runtime"):
        assert choose("x.y", requested, specs, lambda spec: spec.reason) is chosen
    assert caplog.messages == [line]


@pytest.mark.parametrize(
    ("requested", "why"), [("a", "a: no driver"), ("b", "b: no compiler"), ("auto", "a: no driver; b: no compiler")]
)
def test_none_that_can_run_is_an_error_with_the_reason_of_each(requested, why):
    specs = [NO_A, NO_B] + ([C] if requested != "auto" else [])
    with pytest.raises(BackendUnavailable) as caught:
        choose("x.y", requested, specs, lambda spec: spec.reason)
    assert str(caught.value) == (
        f"x.y ({requested!r}) cannot run here: {why}. Set it to auto to use the fastest one that is available"
    )


def test_choices_are_logged_again_after_a_model_whose_choices_are_not(caplog):
    with caplog.at_level(logging.INFO, "qsparse_moe.nn.runtime"):
        with pytest.raises(KeyError), choices_unlogged():
            choose("x.y", "auto", [C], lambda spec: spec.reason)
            logging.getLogger("qsparse_moe.nn.runtime").warning("a fault")
            raise KeyError
        assert caplog.messages == ["a fault"], "a warning is no choice"
        caplog.clear()
        choose("x.y", "auto", [D], lambda spec: spec.reason)
    assert caplog.messages == ["x.y=auto: using d"]
