"""A gradient that changes from straight-through to masked is set in every step, and the same after a resume."""

from __future__ import annotations

import os
import signal

import pytest

from qsparse_moe.model.transformer import Transformer
from qsparse_moe.training.loop import train

BLEND = {"gradient": "blend", "blend": {"start": 1.0, "end": 0.5, "hold_steps": 1, "ramp_steps": 4}}


def run(config, sparsity, *, stop_at=None):
    """Collects the losses by step, and stops the run by a signal after a given step."""
    merged = config.model.sparsity.model_validate(config.model.sparsity.model_dump() | sparsity)
    model = config.model.model_copy(update={"sparsity": merged})
    losses = {}

    def listener(report):
        losses[report.step] = report.losses["loss"]
        if stop_at is not None and report.step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train(config.model_copy(update={"model": model}), [listener])
    return losses


def test_the_straight_through_share_follows_the_step_and_continues_in_a_resumed_run(make_config, monkeypatch):
    shares, real = [], Transformer.set_ste_share
    monkeypatch.setattr(
        Transformer, "set_ste_share", lambda model, share: (shares.append(share), real(model, share))[1]
    )
    whole = run(make_config("whole", steps=6), BLEND)
    assert shares[:6] == [1.0, 1.0, 0.875, 0.75, 0.625, 0.5]
    del shares[:]
    parts = run(make_config("parts", steps=6), BLEND, stop_at=4)
    assert sorted(parts) == [1, 2, 3, 4]
    del shares[:]
    parts |= run(make_config("parts", steps=6, resume=True), BLEND)
    assert shares[:2] == [0.625, 0.5]
    assert parts == whole
    plain = run(make_config("ste", steps=6), {"gradient": "ste"})
    assert [whole[step] == plain[step] for step in (1, 2, 3)] == [True] * 3  # two equal gradients lie before these
    assert whole[6] != pytest.approx(plain[6], rel=1e-9)
