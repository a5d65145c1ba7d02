"""The decoder-only Transformer. B batch, S sequence, D width, V vocabulary, L layers, E experts, G groups of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qsparse_moe.config.rules import check_model
from qsparse_moe.config.schema import ModelConfig, Recompute, Site
from qsparse_moe.config.shapes import attended_size, layers_with_site, vocab_size
from qsparse_moe.model.attention import Attend
from qsparse_moe.model.block import Block, BlockOutput
from qsparse_moe.model.document_attention import DocumentAttention, resolve_document_backend
from qsparse_moe.model.documents import last_of_documents
from qsparse_moe.model.init import RandomWeights, materialize
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.output_head import IGNORED_LABEL, OutputHead, mean_loss, summed_loss
from qsparse_moe.model.recompute import run_part
from qsparse_moe.model.rope import rotation_at
from qsparse_moe.moe.expert_group import ALONE, ExpertGroup
from qsparse_moe.moe.losses import BalanceTerms, StepLoad, load_balance_loss
from qsparse_moe.moe.router import Router
from qsparse_moe.moe.runtime import resolve_runtime
from qsparse_moe.nn.shared_selector import ENERGY, ROWS, SharedSelector
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.stats import Stats, stack_layers

LayerHook = Callable[[int, Tensor], None]
"""Called with the number of a layer and its output ``(B, S, D)``."""


def build_model(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    expert_group: ExpertGroup = ALONE,
) -> Transformer:
    """Build the model that ``config`` describes, with weights drawn from ``seed`` and S from its sparsity settings.

    Every weight is computed in fp32 on the CPU and stored in ``dtype`` (None is fp32) on ``device``, so that all
    devices and dtypes have the same values. With an ``expert_group`` this rank holds its shard of every layer's
    experts, and all ranks of the group must run the model together.

    Where ``config.vocab_size`` is None the model is one of bytes, with 264 rows: the section alone does not know the
    run's tokenizer. ``data.tokenizer.with_vocabulary(run_config).model`` has the rows that another tokenizer needs.

    Raises:
        BackendUnavailable: the backend of the experts or of the sparse sites cannot run on ``device``.
        ConfigError: a rule is broken, a sparsity override matches nothing, or the plan file does not fit the model.
    """
    model = build_empty(config, device=device, expert_group=expert_group)
    materialize(model, RandomWeights(config, seed), device=device, dtype=dtype or torch.get_default_dtype())
    return model


def build_empty(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    expert_group: ExpertGroup = ALONE,
    checks_rules: bool = True,
) -> Transformer:
    """Build a model for ``device`` whose parameters are on the meta device, without memory; its buffers are real.

    ``init.materialize`` gives it weights. It raises as ``build_model`` does; ``checks_rules`` is False for a variant of
    a model that is only evaluated, to which rules about training need not apply.
    """
    if checks_rules:
        check_model(config)
    with torch.device("meta"):
        model = Transformer(config, device=device, expert_group=expert_group)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Zero is the initial value of the routers' biases; K and thresholds are set below.
            setattr(module, name, torch.zeros_like(buffer, device=device))
    model.set_sparsity(model.sparsity_plan)
    return model


class Transformer(nn.Module):
    """A pre-norm decoder with routed experts and a sparse site in front of every projection inside its layers."""

    def __init__(
        self, config: ModelConfig, *, device: torch.device | str = "cpu", expert_group: ExpertGroup = ALONE
    ) -> None:
        super().__init__()
        self.config = config
        self.step_load: StepLoad | None = None
        """Set by the training engine for a load balance loss over the global batch. Without it, and in evaluation, the
        loss covers the micro-batch alone."""
        self.activation_checkpointing: Recompute = "none"
        """The parts of a layer that the backward recomputes, from the next forward on."""
        self._hidden_ids: Tensor | None = None
        self.runtime = resolve_runtime(config, device, expert_group=expert_group)
        if config.attention_backend != "auto":
            # The dtype of the queries, which auto needs, is not known before the first batch.
            resolve_document_backend(config.attention_backend, torch.device(device), None, attended_size(config))
        # nn.Embedding(V, D) would draw values, for which PyTorch imports its compiler on the meta device (1.7 s).
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size(config), config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer, self.runtime) for layer in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.head = OutputHead(config.hidden_size, vocab_size(config))
        if config.tie_embeddings:
            # One parameter object: the optimizer and the initialisation meet it once, under the name of the embedding.
            self.head.weight = self.embedding.weight
        self.sparsity_plan = SparsityPlan.from_config(config)
        self.set_sparsity(self.sparsity_plan)

    def set_sparsity(self, plan: SparsityPlan) -> None:
        """Use ``plan`` from the next forward on, without rebuilding anything.

        Raises:
            ConfigError: the plan was made for another model, or lacks thresholds that the selection needs.
        """
        # Checked first, so that a refused plan leaves the model unchanged.
        plan.check_fits(self.config)
        self.sparsity_plan = plan
        for block in self.blocks():
            block.set_sparsity(plan)

    def set_ste_share(self, share: float) -> None:
        """Blend the gradients of every site from the next forward on.

        Args:
            share: weight of the straight-through gradient, from 0 to 1; the masked gradient has the rest.
        """
        for block in self.blocks():
            for site in block.sites().values():
                site.ste_share = share

    def measure_energies(self, measures: bool) -> None:
        """Measure the energies of a shared selection in the next forward passes in training, or do not.

        A new model measures in every pass. With another selection this has no effect.
        """
        for selector in self._shared_selectors().values():
            selector.measures = measures

    @property
    def has_averages(self) -> bool:
        """Whether every selector of a shared selection has been measured; True with another selection."""
        return all(selector.is_measured for selector in self._shared_selectors().values())

    def update_shared_sets(self, stats: Stats) -> None:
        """Add the energies that a step has measured to the running averages. Call it once per step.

        Args:
            stats: ``measured_energies`` of the step, summed over its micro-batches and over all ranks.
        """
        for (layer, site), selector in self._shared_selectors().items():
            energy_LED, rows_LE = (stats.get(f"sparsity/{site}/{name}") for name in (f"{ENERGY}_LED", f"{ROWS}_LE"))
            if energy_LED is not None and rows_LE is not None:
                index = layers_with_site(self.config, site).index(layer)
                selector.update(energy_LED[index], rows_LE[index])

    def _shared_selectors(self) -> dict[tuple[int, Site], SharedSelector]:
        """Return the selectors of a shared selection by layer and site; none with another selection."""
        return {
            (block.layer, name): site.shared
            for block in self.blocks()
            for name, site in block.sites().items()
            if site.shared is not None
        }

    @property
    def router_bias_LE(self) -> Tensor | None:
        """The load-balancing biases ``(L, E)`` of the MoE layers; None if their routers have none."""
        biases = [router.expert_bias for router in self.routers() if router.expert_bias is not None]
        return torch.stack(biases) if biases else None

    def update_router_bias(self, routed_LE: Tensor, rate: float) -> None:
        """Update the biases of all routers with ``Router.update_bias``. Call it once per step.

        Args:
            routed_LE: number of routed tokens per MoE layer and expert in the step, summed over all ranks.
            rate: change of each bias.
        """
        for router, routed_E in zip(self.routers(), routed_LE, strict=True):
            router.update_bias(routed_E, rate)

    def hide_ids(self, ids: Sequence[int]) -> None:
        """Set the logits of these token ids to -inf in evaluation mode, so that they are never generated.

        They are vocabulary entries that decode to no token, such as padding up to a round size. Training is not
        affected.
        """
        self._hidden_ids = torch.tensor(ids, dtype=torch.int64) if ids else None

    @property
    def hidden_ids(self) -> Tensor | None:
        """The token ids that have no probability in evaluation mode, on the CPU; None without any."""
        return self._hidden_ids

    def routers(self) -> list[Router]:
        """Return the routers of the MoE layers, in order."""
        return [block.moe.router for block in self.blocks() if block.moe is not None]

    def blocks(self) -> Iterator[Block]:
        """Iterate over the decoder layers in order."""
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
        loss_weight: Tensor | None = None,
        with_stats: bool = True,
        with_logits: bool = True,
        layer_hook: LayerHook | None = None,
    ) -> ModelOutput:
        """Return the logits and, if labels or targets are given, the loss.

        Args:
            tokens_BS: ``(B, S)`` token ids.
            labels_BS: ``(B, S)``, the tokens themselves, as in ``transformers``: the model shifts them, so that
                position s is trained to predict ``labels_BS[:, s + 1]``. The last position predicts nothing, and with
                ``documents_BS`` neither does the last position of every document. -100 is ignored.
            targets_BS: ``(B, S)``, instead of ``labels_BS``: the token that each position is trained to predict,
                already shifted, as in a ``Batch``. -100 is ignored.
            positions_BS: ``(B, S)`` positions for the rotary embedding; None counts from 0.
            documents_BS: ``(B, S)`` document ids; a document is a run of equal ids. Attention does not cross documents;
                None is one document per sequence. Best in host memory, where reading them does not wait for a GPU.
            loss_weight: factor of the mean loss over the targets, without the routers' losses; None is 1.
            with_stats: if False, ``router/routed_LE`` is the only statistic, beside ``measured_energies``.
            with_logits: if False, the logits of the output are an empty tensor. With targets their loss then needs less
                memory, and hidden ids (``hide_ids``) have a probability, as in training.
            layer_hook: called with the number and the output of every layer. The output is part of the graph, so the
                hook may register gradient hooks on it.

        Raises:
            ValueError: both ``labels_BS`` and ``targets_BS`` are given.
        """
        if labels_BS is not None:
            if targets_BS is not None:
                raise ValueError(
                    "labels_BS and targets_BS are both given, but one of them must be None: the model shifts "
                    "labels_BS, and targets_BS are already shifted; leave one of them out"
                )
            targets_BS = shifted_labels(labels_BS, documents_BS)
        hidden_BSD = self.embed(tokens_BS)
        hidden_BSD, outputs = self.run_layers(
            hidden_BSD,
            positions_BS,
            with_stats=with_stats,
            layer_hook=layer_hook,
            attends=None if documents_BS is None else self._attends_inside(documents_BS),
        )
        logits_BSV = self.logits(hidden_BSD) if with_logits else hidden_BSD.new_empty(0)
        stats = stack_layers([output.stats for output in outputs])
        if targets_BS is None:
            return ModelOutput(logits_BSV, None, {}, stats)
        lm_loss = cross_entropy(logits_BSV, targets_BS) if with_logits else self._lm_loss(hidden_BSD, targets_BS)
        loss, losses = self.losses(lm_loss if loss_weight is None else lm_loss * loss_weight, outputs)
        return ModelOutput(logits_BSV, loss, losses, stats)

    def run_layers(
        self,
        hidden_BSD: Tensor,
        positions_BS: Tensor | None,
        *,
        with_stats: bool,
        layer_hook: LayerHook | None = None,
        attends: Sequence[Attend] | None = None,
    ) -> tuple[Tensor, list[BlockOutput]]:
        """Return the output of the last layer, and the output of every layer.

        Args:
            hidden_BSD: the embedded tokens.
            positions_BS: as in ``forward``.
            with_stats: as in ``forward``.
            layer_hook: as in ``forward``.
            attends: the product of queries with keys and values of every layer, in place of the model's own.
        """
        if positions_BS is None:
            positions_BS = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)[None]
        rotation = rotation_at(positions_BS, self.config, hidden_BSD.dtype)
        chosen = self.activation_checkpointing
        outputs: list[BlockOutput] = []
        for layer, block in enumerate(self.layers):
            attend = None if attends is None else attends[layer]
            outputs.append(run_part(chosen, "full", block, hidden_BSD, rotation, with_stats, chosen, None, attend))
            hidden_BSD = outputs[-1].hidden_BSD
            if layer_hook is not None:
                layer_hook(layer, hidden_BSD)
        return hidden_BSD, outputs

    def _attends_inside(self, documents_BS: Tensor) -> list[Attend]:
        """Return the attention of every layer inside of documents: one object, which prepares the batch once."""
        scale = next(self.blocks()).attention.scale
        return [DocumentAttention(documents_BS, scale, self.config.attention_backend)] * len(self.layers)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Return ``(B, S, D)``; ValueError for an id that the model has no row for."""
        try:
            # No check beforehand: reading the ids would make every forward pass wait for a GPU.
            return self.embedding(tokens_BS)
        except IndexError:
            rows = self.embedding.weight.shape[0]
            raise ValueError(
                f"tokens_BS holds ids from {int(tokens_BS.min())} to {int(tokens_BS.max())}, and the model has {rows} "
                "rows, for ids from 0 on; build it with the model.vocab_size of the tokenizer, which "
                "with_vocabulary(run_config).model has"
            ) from None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(*, V)`` of the last layer's output ``(*, D)``; see ``hide_ids``."""
        logits = self.head(self.final_norm(hidden))
        # Only outside of training, where the loss keeps the values that it has always had.
        if self._hidden_ids is None or self.training:
            return logits
        return logits.index_fill(-1, self._hidden_ids.to(logits.device), -torch.inf)

    def _lm_loss(self, hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Return ``cross_entropy`` of the logits, without a tensor of all of them where they are many."""
        total = self.head(self.final_norm(hidden_BSD).flatten(0, 1), targets_BS.flatten())
        return mean_loss(total, targets_BS)

    def losses(self, lm_loss: Tensor, outputs: Sequence[BlockOutput]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms, as in ``ModelOutput``; ``lm_loss`` is that of the shifted targets."""
        # Only the total keeps the graph. The terms are for reports and must not keep activations alive.
        losses = {"lm_loss": lm_loss.detach()}
        balances = [output.balance for output in outputs if output.balance is not None]
        z_losses = [output.router_z_loss for output in outputs if output.router_z_loss is not None]
        if not balances:
            return lm_loss, losses
        # Means over the layers, so that the coefficients do not depend on the depth of the model.
        balance, z = self._balance_loss(balances), torch.stack(z_losses).mean()
        moe = self.config.moe
        loss = lm_loss + moe.load_balance_coefficient * balance + moe.router_z_coefficient * z
        return loss, losses | {"load_balance_loss": balance.detach(), "router_z_loss": z.detach()}

    def _balance_loss(self, balances: list[BalanceTerms]) -> Tensor:
        """Return the mean over the layers."""
        rows_LGE, probs_LGE = (torch.stack(parts) for parts in zip(*balances, strict=True))
        # Computed here, outside of the recomputed layers, because recomputation would count the tokens twice.
        is_global = self.config.moe.load_balance_scope == "global_batch"
        if is_global and self.step_load is not None and self.training and torch.is_grad_enabled():
            rows_LGE = self.step_load.add(rows_LGE)
        return load_balance_loss(BalanceTerms(rows_LGE, probs_LGE))


def measured_energies(stats: Stats) -> Stats:
    """Return the sums of a forward pass, or of several, from which ``Transformer.update_shared_sets`` learns."""
    return {name: value for name, value in stats.items() if name.endswith((f"/{ENERGY}_LED", f"/{ROWS}_LE"))}


def shifted_labels(labels_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
    """Return the token that each position is trained to predict: ``(B, S)``, the label of the next position.

    The last position is ignored, and with ``documents_BS`` so is the last position of every document.
    """
    targets_BS = torch.full_like(labels_BS, IGNORED_LABEL)
    targets_BS[:, :-1] = labels_BS[:, 1:]
    if documents_BS is not None:
        targets_BS.masked_fill_(last_of_documents(documents_BS).to(targets_BS.device), IGNORED_LABEL)
    return targets_BS


def cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the mean loss over the targets that are not ignored, in nats and at least fp32; 0 if all are ignored."""
    return mean_loss(summed_loss(logits_BSV.flatten(0, 1), targets_BS.flatten()), targets_BS)
