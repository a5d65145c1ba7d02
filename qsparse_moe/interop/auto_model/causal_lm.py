"""Any model of this package as a causal language model of transformers.

B batch, S new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsparse_moe.interop.auto_model.attention import AttentionCall, InterfaceAttention, attends
from qsparse_moe.interop.auto_model.config import QSparseMoEConfig
from qsparse_moe.interop.auto_model.library import (
    DynamicCache,
    GenerationMixin,
    MoeCausalLMOutputWithPast,
    PreTrainedModel,
    can_return_tuple,
    create_causal_mask,
)
from qsparse_moe.interop.auto_model.refusals import check_checkpointing, check_loading, check_options
from qsparse_moe.interop.auto_model.settings import PREFIX
from qsparse_moe.interop.auto_model.training_loss import recorded_routings, without_padding
from qsparse_moe.model.block import BlockOutput
from qsparse_moe.model.device import use_device
from qsparse_moe.model.init import initialize_parameter
from qsparse_moe.model.transformer import IGNORED_LABEL, Transformer, cross_entropy, shifted_labels
from qsparse_moe.moe.router import Routing
from qsparse_moe.sparsity.plan import SparsityPlan


class QSparseMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """A ``Transformer`` behind the interface of transformers' models; ``model`` is the ``Transformer`` itself.

    Attention goes through transformers' attention interface and its caches; everything else is the package's own code,
    with its sparse sites and its backends of the experts.
    """

    config_class = QSparseMoEConfig
    base_model_prefix = PREFIX.removesuffix(".")
    """The one name in front of the names of our state dict. Files without it, such as an export's, are read too."""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    """False: the loss is the mean of each micro-batch, as in our training, and Trainer averages it over several."""
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}
    # Small updates of these biases, and of the averages of a shared selection, would round to nothing in bf16.
    _keep_in_fp32_modules_strict = ["expert_bias", "mean_energy_ED"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: QSparseMoEConfig) -> None:
        super().__init__(config)
        model, plan = config.read()
        self.model = Transformer(model)
        # Nobody here adds up what the ranks measure: the sets of a shared selection stay as they were trained.
        self.model.measure_energies(False)
        self.model.set_sparsity(plan)
        self.attentions = nn.ModuleList(
            InterfaceAttention(config, block.layer, block.attention.scale) for block in self.model.blocks()
        )
        self.gradient_checkpointing = False
        self._runtime_device = "cpu"
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder; see ``PreTrainedModel.from_pretrained``.

        Raises:
            ConfigError: tensor parallelism was requested.
        """
        check_loading(kwargs)
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def of(cls, model: Transformer, **settings: Any) -> QSparseMoEForCausalLM:
        """Return a model around ``model`` itself; ``settings`` are those of ``QSparseMoEConfig.of``."""
        config = QSparseMoEConfig.of(model.config, model.sparsity_plan, **settings)
        # Nothing is allocated for the weights that are replaced at once.
        with torch.device("meta"):
            wrapper = cls(config)
        wrapper.model = model
        model.measure_energies(False)
        # Chosen when it was built.
        wrapper._runtime_device = model.embedding.weight.device.type
        return wrapper.train(model.training)

    @property
    def base_model(self) -> nn.Module:
        """The model itself: ``model`` is no model of transformers."""
        return self

    def get_input_embeddings(self) -> Any:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> Any:
        """Return the output head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Take the weight of a new linear head, or another module in its place."""
        if type(new_embeddings) is not nn.Linear:
            self.model.head = new_embeddings
            return
        # Our own module stays, because its product is faster than that of nn.Linear on some processors.
        self.model.head.weight = new_embeddings.weight
        self.model.head.out_features = new_embeddings.out_features

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Change the number of token ids; see ``PreTrainedModel.resize_token_embeddings``."""
        embedding: nn.Module = super().resize_token_embeddings(*args, **kwargs)
        rows = self.model.embedding.weight.shape[0]
        self.model.config = self.model.config.model_copy(update={"vocab_size": rows})
        self.config.update_section(self.model.config, self.model.sparsity_plan)
        return embedding

    def set_sparsity(self, plan: SparsityPlan) -> None:
        """Use ``plan`` from the next forward on; ``save_pretrained`` saves it.

        Raises:
            ConfigError: the plan was made for another model, or lacks thresholds that the selection needs.
        """
        self.model.set_sparsity(plan)
        self.config.update_section(self.model.config, plan)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the weights that no file gave, from the seed of ``torch.manual_seed``, and set the sparse sites.

        transformers calls it for a new model, and after loading.
        """
        seed = int(torch.randint(2**31, ()))
        for name, parameter in self.model.named_parameters():
            # A parameter on the meta device is read from the disk when its layer runs.
            if not (getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta):
                initialize_parameter(name, parameter, self.model.config, seed)
        # Buffers outside of the state dict hold K and thresholds, and loading leaves them undefined.
        self.model.set_sparsity(self.model.sparsity_plan)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: ``initialize_weights`` has done it."""

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:
        check_checkpointing(options)
        self.gradient_checkpointing = enable
        self.model.activation_checkpointing = "full" if enable else "none"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits, and with labels the loss.

        In training the loss is that of our training: the language-model loss plus the weighted losses of the routers,
        which do not count padding. In evaluation it is the language-model loss alone.

        Args:
            input_ids: ``(B, S)`` token ids.
            attention_mask: ``(B, tokens so far)``, 0 at padding; or a mask in the form of the attention implementation.
            position_ids: ``(B, S)``; None continues from the cache.
            past_key_values: a ``Cache`` of transformers with the earlier tokens.
            inputs_embeds: ``(B, S, D)``, in place of ``input_ids``.
            labels: ``(B, S)``, the tokens themselves; the model shifts them, and -100 is ignored.
            use_cache: return a cache; None: as the configuration says in evaluation, and none in training.
            output_attentions: return the attention weights, which only ``eager`` forms.
            output_hidden_states: return the embedded tokens and the output of every layer, the last one normed.
            output_router_logits: return the router logits ``(B * S, E)`` of every MoE layer.
            logits_to_keep: number of last tokens to return logits for, or their indices; 0: all.
            options: arguments of the attention implementation.

        Raises:
            ConfigError: an argument is not supported, or two contradict each other.
        """
        check_options(input_ids, inputs_embeds, labels, logits_to_keep, options)
        hidden_BSD = inputs_embeds if input_ids is None else self.model.embed(input_ids)
        assert hidden_BSD is not None
        self._follow_device(hidden_BSD.device)
        cache = self._cache(past_key_values, use_cache)
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device) + start)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BSD,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        call = AttentionCall(mask, cache, options | {"position_ids": position_ids})
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        # A loss needs them where there is padding.
        needs_routings = output_router_logits or (labels is not None and attention_mask is not None)
        hidden_states = [hidden_BSD]
        with recorded_routings(self.model, needs_routings) as routings:
            hidden_BSD, outputs = self.model.run_layers(
                hidden_BSD,
                position_ids,
                with_stats=False,
                layer_hook=(lambda _, hidden: hidden_states.append(hidden)) if output_hidden_states else None,
                attends=attends(self.attentions, call),
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.model.logits(hidden_BSD[:, kept])
        loss, balance = None, None
        if labels is not None:
            loss, balance = self._loss(logits_BSV, labels, attention_mask, outputs, routings)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits_BSV,
            past_key_values=cache,
            hidden_states=self._hidden_states(hidden_states) if output_hidden_states else None,
            attentions=tuple(call.weights) if output_attentions else None,
            router_logits=tuple(routing.logits_TE for routing in routings) if output_router_logits else None,
        )

    def _cache(self, given: Any, use_cache: bool | None) -> Any:
        if given is not None:
            return given
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        # A recomputed layer would store its keys and values twice. Without a cache the result is the same.
        recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
        return DynamicCache(config=self.config) if wanted and not recomputes else None

    def _follow_device(self, device: torch.device) -> None:
        """Choose the backends again if the weights were moved to a device of another kind since the last forward."""
        if device.type != self._runtime_device:
            use_device(self.model, device)
            self._runtime_device = device.type

    def _loss(
        self,
        logits_BSV: Tensor,
        labels_BS: Tensor,
        attention_mask: Tensor | None,
        outputs: list[BlockOutput],
        routings: list[Routing],
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss, and the load balance loss without its coefficient (None in a model without experts)."""
        targets_BS = shifted_labels(labels_BS.to(logits_BSV.device))
        # A mask of four dimensions says who attends to whom, and not which tokens are padding.
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.all():
            counted_BS = attention_mask.bool()
            # Padding in front of a sequence predicts nothing, not even its first token.
            targets_BS = targets_BS.masked_fill(~counted_BS, IGNORED_LABEL)
            outputs = without_padding(outputs, routings, counted_BS, self.model.config.moe.load_balance_scope)
        lm_loss = cross_entropy(logits_BSV, targets_BS)
        loss, terms = self.model.losses(lm_loss, outputs)
        return loss if self.training else lm_loss, terms.get("load_balance_loss")

    def _hidden_states(self, hidden_states: list[Tensor]) -> tuple[Tensor, ...]:
        return (*hidden_states[:-1], self.model.final_norm(hidden_states[-1]))
