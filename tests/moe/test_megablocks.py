"""The backend of the real MegaBlocks: on a CPU under Triton's interpreter, on a GPU compiled.

T tokens, A experts per token, N = T * A rows, D width, F expert width, E experts. Rows are few: the interpreter takes
milliseconds for each.
"""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig, SparsityConfig
from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.kernels import tiles
from qsparse_moe.model.init import initialize
from qsparse_moe.moe.backends import grouped, megablocks, megablocks_package
from qsparse_moe.moe.backends import loop as loop_backend
from qsparse_moe.moe.backends.registry import BACKENDS
from qsparse_moe.moe.layer import MoELayer
from qsparse_moe.moe.permutation import TokenCounts, combine_reference, permute_reference, sort_by_expert
from qsparse_moe.moe.runtime import resolve_runtime

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
E = 5  # not a power of two: the bits by which MegaBlocks sorts can hold more values than there are experts
CASES = {
    "scattered": [[0, 2], [3, 1], [4, 0], [1, 2], [0, 4]],
    "all on one expert": [[2], [2], [2]],
    "first and last without rows": [[1, 3], [3, 2]],
    "one token": [[3, 1]],
    "three experts per token": [[0, 3, 1], [4, 1, 0]],
}
PARAMETERS = pytest.mark.parametrize("case", CASES)


def ready(device):
    """Skip where another machine runs this test. That MegaBlocks is not installed is a failure."""
    reason = tiles.why_not(torch.device(device))
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("device", DEVICES)
@PARAMETERS
def test_rows_are_those_of_the_dispatch(case, device):
    ready(device)
    expert_ids_TA = torch.tensor(CASES[case], device=device)
    mine, want = megablocks.sort(expert_ids_TA, E), sort_by_expert(expert_ids_TA, E)
    for name in ("expert_N", "slot_N", "token_N", "tokens_per_expert_E"):
        assert getattr(mine, name).tolist() == getattr(want, name).tolist(), name
        assert getattr(mine, name).dtype == torch.int32
    assert mine.ends_E.tolist() == want.tokens_per_expert_E.cumsum(0).tolist()


def test_a_single_expert_receives_all_tokens():
    ready("cpu")
    rows = megablocks.sort(torch.zeros(3, 1, dtype=torch.int64), 1)
    assert (rows.tokens_per_expert_E.tolist(), rows.ends_E.tolist()) == ([3], [3])


def there_and_back(permute, combine, rows, leaves, upstream, dtype):
    """Return rows, tokens and the gradients of both and of the weights, which have their own dtype."""
    x, weights = (leaf.clone().requires_grad_() for leaf in (leaves[0].to(dtype), leaves[1]))
    rows_ND = permute(x, rows)
    y_TD = combine(rows_ND.sin(), weights, rows)
    grads = torch.autograd.grad((rows_ND, y_TD), (x, weights), [part.to(dtype) for part in upstream])
    return dict(zip(("rows", "y", "grad_x", "grad_weights"), (rows_ND, y_TD, *grads), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 300])
@PARAMETERS
def test_permutation_matches_its_definition_in_value_and_every_gradient(case, width, dtype, device):
    ready(device)
    torch.manual_seed(0)
    expert_ids_TA = torch.tensor(CASES[case], device=device)
    num_tokens, choices = expert_ids_TA.shape
    leaves = [torch.randn(num_tokens, width, device=device), torch.rand(num_tokens, choices, device=device)]
    upstream = [torch.randn(rows, width, device=device) for rows in (num_tokens * choices, num_tokens)]
    rows, dispatch = megablocks.sort(expert_ids_TA, E), sort_by_expert(expert_ids_TA, E)
    got = there_and_back(megablocks.permute, megablocks.combine, rows, leaves, upstream, dtype)
    plain, exact = (
        there_and_back(permute_reference, combine_reference, dispatch, list(map(cast, leaves)), upstream, other)
        for cast, other in ((torch.Tensor.float, dtype), (torch.Tensor.double, torch.float64))
    )
    for name, want in exact.items():
        assert got[name].dtype == (torch.float32 if name == "grad_weights" else dtype), name
        rounding = (plain[name].double() - want).abs().max()
        # Beside the reference's own error: each of a token's rows is rounded once more, and the interpreter cuts off.
        allowed = 2 * rounding + 2 * choices * torch.finfo(dtype).eps * want.abs().max()
        error = (got[name].double() - want).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e} > allowed {allowed:.2e}"
    assert torch.equal(got["rows"], plain["rows"])


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_are_not_contiguous_are_read_as_they_are(device):
    ready(device)
    expert_ids_TA = torch.tensor([[0], [4], [2]], device=device)
    rows, dispatch = megablocks.sort(expert_ids_TA, E), sort_by_expert(expert_ids_TA, E)
    x_TD, weights_TA = torch.randn(6, 3, device=device).T, torch.rand(3, 2, device=device)[:, :1]
    rows_ND = megablocks.permute(x_TD, rows)
    assert torch.equal(rows_ND, permute_reference(x_TD, dispatch))
    y_ND = rows_ND.T.contiguous().T
    want = combine_reference(y_ND, weights_TA, dispatch)
    torch.testing.assert_close(megablocks.combine(y_ND, weights_TA, rows), want)


@pytest.mark.gpu
def test_no_operation_synchronises_with_the_device():
    expert_ids_TA = torch.tensor(CASES["scattered"], device="cuda")
    leaves = [torch.randn(5, 64, device="cuda"), torch.rand(5, 2, device="cuda")]
    upstream = [torch.randn(10, 64, device="cuda"), torch.randn(5, 64, device="cuda")]

    def run():
        rows = megablocks.sort(expert_ids_TA, E)
        there_and_back(megablocks.permute, megablocks.combine, rows, leaves, upstream, torch.bfloat16)

    run()  # compiles and chooses configurations
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("load", [[5, 0, 7], [0, 0, 17], [1, 30, 2]], ids=str)
def test_products_on_a_gpu_match_the_loop(load):
    torch.manual_seed(0)
    counts = TokenCounts(torch.tensor(load, device="cuda", dtype=torch.int32))
    inputs = [torch.randn(sum(load), 64, device="cuda"), torch.randn(len(load), 64, 32, device="cuda")]
    upstream = torch.randn(sum(load), 32, device="cuda")

    def run(matmul, dtype):
        leaves = [part.to(dtype).requires_grad_() for part in inputs]
        out = matmul(*leaves, counts)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    exact, plain, fast = (
        run(loop_backend.matmul, torch.float64),
        run(loop_backend.matmul, torch.bfloat16),
        run(megablocks.matmul, torch.bfloat16),
    )
    for want, reference, got in zip(exact, plain, fast, strict=True):
        allowed = 2 * (reference.double() - want).abs().max() + torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


def settings(backend, **changed):
    moe = MoEConfig(num_experts=4, expert_hidden_size=24, backend=backend, num_shared_experts=1)
    sparsity = SparsityConfig(backend="torch")
    return ModelConfig(hidden_size=16, num_heads=2, moe=moe.model_copy(update=changed), sparsity=sparsity)


def layer(backend, device, sparsity_of_experts, **changed):
    config = settings(backend, **changed)
    made = MoELayer(config, resolve_runtime(config, device))
    initialize(made, config, seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(20)  # away from zero, where many mistakes give the same result
    made.input_site.set_sparsity(sparsity_of_experts)
    made.experts.hidden_site.set_sparsity(sparsity_of_experts)
    return made.to(device)


DENSE, UNIFORM, PER_EXPERT = [0.0] * 4, [0.5] * 4, [0.0, 0.5, 0.25, 0.75]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize(
    ("sparsity", "num_tokens", "capacity"),
    [
        (DENSE, 6, None),
        (UNIFORM, 6, None),
        (PER_EXPERT, 6, None),
        (UNIFORM, 1, None),
        (UNIFORM, 6, 0.5),
        (PER_EXPERT, 6, 0.5),
    ],
    ids=["dense", "uniform", "per expert", "one token", "uniform, full", "per expert, full"],
)
def test_layer_agrees_with_the_loop_in_value_every_gradient_and_every_sum(
    sparsity, num_tokens, capacity, activation, device
):
    ready(device)
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 1, num_tokens, 16, device=device)
    results = []
    for backend in ("megablocks", "loop"):
        made = layer(backend, device, sparsity, activation=activation, capacity_factor=capacity)
        leaf = x.clone().requires_grad_()
        output = made(leaf)
        leaves = {"x": leaf, **dict(made.named_parameters())}
        grads = torch.autograd.grad(output.y_BSD, list(leaves.values()), upstream)
        results.append({"y": output.y_BSD, **dict(zip(leaves, grads, strict=True)), **output.stats})
    mine, want = results
    assert mine.keys() == want.keys()
    assert ("router/dropped_E" in want) == (capacity is not None)
    for name, exact in want.items():
        close = {"rtol": 1e-5, "atol": 1e-5 * exact.abs().max().item() if exact.is_floating_point() else 0}
        torch.testing.assert_close(mine[name], exact, **close, msg=f"{name} differs")


def test_all_tokens_may_choose_the_same_experts():
    ready("cpu")
    made = layer("megablocks", "cpu", UNIFORM)
    with torch.no_grad():
        made.router.weight.zero_()
    output = made(torch.randn(1, 3, 16))
    output.y_BSD.sum().backward()
    assert sorted(output.stats["router/routed_E"].tolist()) == [0, 0, 3, 3]
    rows_E = output.stats["router/routed_E"]
    assert [bool(g.any()) for g in made.experts.w_down.grad] == [bool(n) for n in rows_E]


def test_the_backend_is_chosen_by_name_and_never_by_auto():
    ready("cpu")
    assert resolve_runtime(settings("megablocks"), "cpu").names["model.moe.backend"] == "megablocks"
    # Where grouped runs auto takes it or one before it; where it does not, megablocks does not either.
    names = [spec.name for spec in BACKENDS]
    assert names.index("grouped") < names.index("megablocks")
    odd = settings("megablocks", expert_hidden_size=12)
    assert "must be a multiple of 8" in grouped.why_not(odd, torch.device("cpu"))
    with pytest.raises(BackendUnavailable, match=r"'megablocks'.*expert_hidden_size \(12\) must be a multiple of 8"):
        resolve_runtime(odd, "cpu")


def test_without_the_interpreter_a_cpu_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        BackendUnavailable, match=r"'megablocks'.*the device is cpu; TRITON_INTERPRET=1 runs them slowly"
    ):
        resolve_runtime(settings("megablocks"), "cpu")


@pytest.mark.parametrize(("module", "package"), [("megablocks", "megablocks"), ("stk", "stanford-stk")])
def test_a_missing_package_is_named_with_the_way_out(module, package, monkeypatch):
    find = megablocks_package.importlib.util.find_spec
    monkeypatch.setattr(
        megablocks_package.importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    reason = megablocks.why_not(settings("megablocks"), torch.device("cuda"))
    assert reason == f"{package} is not installed; bash launch/megablocks.sh installs it"


def test_tensors_that_the_kernels_cannot_take_are_refused():
    many = megablocks.MegaBlocksTokens(*[torch.empty(2**20, device="meta")] * 4, 1)
    with pytest.raises(
        BackendUnavailable, match="1048576 routed tokens of model.hidden_size 2048 .*lower training.micro_batch_size"
    ):
        megablocks.permute(torch.empty(2**20, 2048, device="meta"), many)
    with pytest.raises(
        BackendUnavailable, match="1048576 routed tokens of model.hidden_size 2048 .*lower training.micro_batch_size"
    ):
        megablocks.combine(torch.empty(2**20, 2048, device="meta"), torch.empty(2**20, 1), many)
    with pytest.raises(BackendUnavailable, match=r"'megablocks'.*fp32 at most, not in torch.float64.*another backend"):
        megablocks.permute(torch.empty(2, 8, dtype=torch.float64), many)
