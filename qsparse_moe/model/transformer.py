"""The decoder-only Transformer. B batch, S sequence, D width, V vocabulary, L layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparse_moe.config.schema import ModelConfig, Recompute
from qsparse_moe.config.shapes import head_size, vocab_size
from qsparse_moe.kernels.onednn import Linear
from qsparse_moe.model.attention import document_mask
from qsparse_moe.model.block import Block, BlockOutput
from qsparse_moe.model.init import initialize
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.recompute import run_part
from qsparse_moe.model.rope import rotation_at
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup
from qsparse_moe.moe.losses import Balance, StepLoad, load_balance_loss
from qsparse_moe.moe.router import Router
from qsparse_moe.moe.runtime import resolve_runtime
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.stats import stack_layers

LayerHook = Callable[[int, Tensor], None]
IGNORED_LABEL = -100


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    expert_group: ExpertGroup = ALONE,
) -> Transformer:
    """The model that ``config`` describes, with the weights that ``seed`` gives and the plan of its sparsity settings.

    The weights are drawn in fp32 on the CPU, so they are the same on every device, and then moved. With an
    ``expert_group`` this rank holds its share of every layer's experts, and all ranks of the group run the model
    together.

    Raises:
        BackendUnavailable: the experts' backend cannot run on ``device``.
        ConfigError: a sparsity override matches nothing.
    """
    model = Transformer(config, device=device, expert_group=expert_group)
    initialize(model, config, seed)
    return model.to(device=device, dtype=dtype)


class Transformer(nn.Module):
    """Pre-norm decoder with routed experts and a sparse site in front of every projection inside the layers."""

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str = "cpu", expert_group: ExpertGroup = ALONE
    ) -> None:
        super().__init__()
        self.config = config
        self.step_load: StepLoad | None = None
        """Given by what trains the model, for a balance loss over the global batch; without it, and in evaluation, a
        batch stands for itself."""
        self.activation_checkpointing: Recompute = "none"
        """What the backward computes again, from the next forward on."""
        self._hidden_ids: Tensor | None = None
        self.runtime = resolve_runtime(config, device, expert_group=expert_group)
        self.embedding = nn.Embedding(vocab_size(config), config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, self.runtime) for layer in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.head = Linear(config.hidden_size, vocab_size(config))
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.sparsity_plan = SparsityPlan.from_config(config)
        self.set_sparsity(self.sparsity_plan)

    def set_sparsity(self, plan: SparsityPlan) -> None:
        """Use ``plan`` from the next forward on; nothing is rebuilt.

        Raises:
            ConfigError: the plan was made for another model, or lacks the thresholds that its selection needs.
        """
        plan.check_fits(self.config)
        self.sparsity_plan = plan
        for block in self.blocks():
            block.set_sparsity(plan)

    def set_ste_share(self, share: float) -> None:
        """Blend the gradient of every site from the next forward on: this share straight through, the rest masked."""
        for block in self.blocks():
            for site in block.sites().values():
                site.ste_share = share

    @property
    def router_bias_LE(self) -> Tensor | None:
        """The biases that balance the load, of every MoE layer; None without them."""
        biases = [router.expert_bias for router in self.routers() if router.expert_bias is not None]
        return torch.stack(biases) if biases else None

    def update_router_bias(self, rows_LE: Tensor, rate: float) -> None:
        """Move the biases once; see ``Router.update_bias``. To be called once a step, with the rows of all ranks."""
        for router, rows_E in zip(self.routers(), rows_LE, strict=True):
            router.update_bias(rows_E, rate)

    def hide_ids(self, ids: Sequence[int]) -> None:
        """Give these token ids no probability outside of training: rows of the vocabulary that stand for nothing.

        From the next forward in evaluation mode on their logits are -inf. Training sees them, as it always did.
        """
        self._hidden_ids = torch.tensor(ids, dtype=torch.int64) if ids else None

    def routers(self) -> list[Router]:
        """Those of the MoE layers, in order."""
        return [block.moe.router for block in self.blocks() if block.moe is not None]

    def blocks(self) -> Iterator[Block]:
        """The decoder layers in order."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            yield layer

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        *,
        targets_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        with_stats: bool = True,
        layer_hook: LayerHook | None = None,
    ) -> ModelOutput:
        """Return the logits, and the loss where labels or targets are given.

        Args:
            tokens_BS: ``(B, S)`` token ids.
            labels_BS: ``(B, S)`` the tokens themselves, as ``transformers`` takes them: they are shifted here, so that
                position s learns to predict ``labels_BS[:, s + 1]``. The last position, and with ``documents_BS`` the
                last one of every document, has nothing to predict. -100 is ignored.
            targets_BS: ``(B, S)`` in place of ``labels_BS``: the token that each position should predict, shifted
                already, as a ``Batch`` holds them. -100 is ignored.
            positions_BS: ``(B, S)`` for the rotary embedding; None counts from 0.
            documents_BS: ``(B, S)`` ids; attention stays inside one id. None lets it cross.
            with_stats: False leaves only ``router/rows_LE`` among the stats.
            layer_hook: called with the number and the output of every layer, inside the graph.

        Raises:
            ValueError: both ``labels_BS`` and ``targets_BS`` are given.
        """
        if labels_BS is not None:
            if targets_BS is not None:
                raise ValueError(
                    "labels_BS and targets_BS are both given, and one of them must be None: labels_BS are shifted by "
                    "the model, targets_BS are shifted already; leave one out"
                )
            targets_BS = shifted_labels(labels_BS, documents_BS)
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        hidden_BSD = self.embedding(tokens_BS)
        rotation = rotation_at(positions_BS, head_size(self.config), self.config.rope_theta, hidden_BSD.dtype)
        mask_B1SS = None if documents_BS is None else document_mask(documents_BS)
        chosen = self.activation_checkpointing
        outputs: list[BlockOutput] = []
        for layer, block in enumerate(self.layers):
            outputs.append(run_part(chosen, "full", block, hidden_BSD, rotation, mask_B1SS, with_stats, chosen))
            hidden_BSD = outputs[-1].hidden_BSD
            if layer_hook is not None:
                layer_hook(layer, hidden_BSD)
        logits_BSV = self.head(self.final_norm(hidden_BSD))
        if self._hidden_ids is not None and not self.training:
            logits_BSV = logits_BSV.index_fill(-1, self._hidden_ids.to(logits_BSV.device), -torch.inf)
        stats = stack_layers([output.stats for output in outputs])
        if targets_BS is None:
            return ModelOutput(logits_BSV, None, {}, stats)
        loss, losses = self._losses(logits_BSV, targets_BS, outputs)
        return ModelOutput(logits_BSV, loss, losses, stats)

    def _losses(
        self, logits_BSV: Tensor, targets_BS: Tensor, outputs: list[BlockOutput]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lm_loss = cross_entropy(logits_BSV, targets_BS)
        losses = {"lm_loss": lm_loss.detach()}
        balances = [output.balance for output in outputs if output.balance is not None]
        z_losses = [output.router_z_loss for output in outputs if output.router_z_loss is not None]
        if not balances:
            return lm_loss, losses
        balance, z = self._balance_loss(balances), torch.stack(z_losses).mean()
        moe = self.config.moe
        loss = lm_loss + moe.load_balance_coefficient * balance + moe.router_z_coefficient * z
        return loss, losses | {"load_balance_loss": balance.detach(), "router_z_loss": z.detach()}

    def _balance_loss(self, balances: list[Balance]) -> Tensor:
        """Mean over the layers. Outside of what is recomputed, so that no row is counted twice."""
        rows_LGE, probs_LGE = (torch.stack(parts) for parts in zip(*balances, strict=True))
        is_global = self.config.moe.load_balance_scope == "global_batch"
        if is_global and self.step_load is not None and self.training and torch.is_grad_enabled():
            rows_LGE = self.step_load.add(rows_LGE)
        return load_balance_loss(Balance(rows_LGE, probs_LGE))


def shifted_labels(labels_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """Return the token that each position should predict: ``(B, S)``, the label after it.

    The last position has none and is ignored, as is the last one of every document where ``documents_BS`` is given.
    """
    targets_BS = torch.full_like(labels_BS, IGNORED_LABEL)
    targets_BS[:, :-1] = labels_BS[:, 1:]
    if documents_BS is not None:
        is_last_BS = documents_BS[:, :-1] != documents_BS[:, 1:]
        targets_BS[:, :-1].masked_fill_(is_last_BS, IGNORED_LABEL)
    return targets_BS


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the mean over the targets that are not ignored, in nats and at least fp32; 0 where all are ignored."""
    wide_TV = logits_BSV.flatten(0, 1).to(torch.promote_types(logits_BSV.dtype, torch.float32))
    total = F.cross_entropy(wide_TV, targets_BS.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (targets_BS != IGNORED_LABEL).sum().clamp(min=1)
