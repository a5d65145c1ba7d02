"""Loss on a fixed set of validation sequences, independent of the layout; and models of finished runs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.data.loader import evaluation_batches, evaluation_num_bytes
from qsparse_moe.data.own_text import OwnText
from qsparse_moe.data.token_data import TokenData, load_data
from qsparse_moe.data.tokenizer import load_tokenizer, meaningless_ids
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import Transformer, build_empty
from qsparse_moe.runs.find import find_model
from qsparse_moe.runs.folder import load_run_config, no_checkpoint
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.sparsity.schedule import scheduled_scale
from qsparse_moe.training.checkpoint.store import Checkpoint, list_checkpoints, load_checkpoint, verified_checkpoint
from qsparse_moe.training.distributed.ranks import Distributed, open_distributed
from qsparse_moe.training.engines.protocol import COMPUTE_DTYPES, run_model
from qsparse_moe.training.shard_weights import choose_sharding

Forward = Callable[[Batch], ModelOutput]


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run's newest checkpoint on validation sequences or on given files."""

    step: int
    """Number of completed training steps."""
    rows: int
    """Number of sequences of ``sequence_length`` labels; with given files the last one may be shorter."""
    loss: float
    """Mean over the labels, in nats per token."""
    perplexity: float
    bits_per_byte: float
    unigram_bits_per_byte: float | None
    """Bits per byte of a byte unigram model fitted to the training text, as a baseline that knows only frequencies.
    None with given files, for which the training text is not read."""
    sparsity: float
    """Mean S of the plan used in the evaluation."""

    def as_dict(self) -> dict[str, float | None]:
        """Return the fields by name."""
        return asdict(self)


class Evaluator:
    """Evaluates on the fixed validation sequences of one rank, which stay in memory for all evaluations of a run."""

    def __init__(self, data: TokenData, *, num_sequences: int, micro_batch_size: int, distributed: Distributed) -> None:
        self._distributed = distributed
        self._batches = evaluation_batches(
            data,
            num_sequences=num_sequences,
            micro_batch_size=micro_batch_size,
            rank=distributed.rank,
            world_size=distributed.world_size,
        )
        self._num_bytes = evaluation_num_bytes(data, num_sequences)
        self.counts_T = torch.cat([batch.targets_BS.flatten() for batch in self._batches]) != IGNORED_LABEL
        """bool, whether the label of each of this rank's tokens counts, in order."""
        self.checksum = _checksum(self._batches, self.counts_T)
        """Checksum of the tokens that count and their labels, in order."""

    def __call__(self, forward: Forward) -> dict[str, float]:
        """Return ``loss`` (nats per label), ``perplexity``, and ``bits_per_byte`` over the sequences of all ranks.

        ``forward`` is called without gradients and must return logits.
        """
        return mean_losses(forward, self._batches, self._num_bytes, self._distributed)


def mean_losses(
    forward: Forward, batches: Sequence[Batch], num_bytes: int, distributed: Distributed
) -> dict[str, float]:
    """Return ``loss``, ``perplexity`` and ``bits_per_byte`` over all ranks' batches, whose text has ``num_bytes``."""
    loss_sum, num_labels = distributed.all_reduce(_sums(forward, batches, distributed)).tolist()
    loss = loss_sum / num_labels
    return {
        "loss": loss,
        # exp overflows if a run has diverged far, which the loss shows already.
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        # The loss is in nats. Bytes and not tokens, so that runs with different tokenizers can be compared.
        "bits_per_byte": loss_sum / math.log(2) / num_bytes,
    }


def load_run(
    run_dir: Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    overrides: Sequence[str] = (),
    checkpoint_folder: Path | None = None,
    distributed: Distributed | None = None,
    shard: bool | None = None,
) -> tuple[RunConfig, Transformer, int]:
    """Return the config, the model of the newest checkpoint, and its number of training steps.

    The sparsity is that of the last step. With ``distributed``, all ranks must call it together.

    Args:
        run_dir: a run folder.
        device: the device of the model.
        dtype: the dtype of the model; None is the one that training computed in.
        overrides: settings that do not affect the weights, such as ``model.sparsity.backend=torch``.
        checkpoint_folder: the checkpoint of the run to load; None is the newest.
        distributed: the ranks, which load the same checkpoint and divide its files among them to verify them.
        shard: whether they divide the weights, too; see ``choose_sharding``.

    Raises:
        CheckpointError: the folder has no complete checkpoint, or the checkpoint is damaged.
        ConfigError: its config.yaml cannot be read, or an override is wrong.
    """
    config = load_run_config(run_dir, overrides)
    checkpoint = chosen_checkpoint(run_dir, checkpoint_folder, distributed)
    if dtype is None:
        dtype = COMPUTE_DTYPES[config.training.precision]
    model = build_empty(config.model, device=device)
    over = choose_sharding(shard, config, distributed)
    load_checkpoint(model, checkpoint, device=device, dtype=dtype, distributed=over)
    step = checkpoint.progress.step
    # The schedule counts steps from 0, so the last one is step - 1.
    scale = scheduled_scale(config.model.sparsity.schedule, max(0, step - 1))
    # From the plan of the config: checkpoints do not contain the plan, which is a function of config and step.
    model.set_sparsity(model.sparsity_plan.scaled(scale, config.model.moe.experts_per_token))
    return config, model.eval(), step


def chosen_checkpoint(run_dir: Path, checkpoint_folder: Path | None, distributed: Distributed | None) -> Checkpoint:
    """Return the named or the newest checkpoint of a run, the same one on all ranks, after all files were compared.

    Raises:
        CheckpointError: the run has none, or it is damaged.
    """

    def find() -> Path:
        folders = list_checkpoints(run_dir) if checkpoint_folder is None else [checkpoint_folder]
        if not folders:
            raise no_checkpoint(run_dir)
        return folders[-1]

    if distributed is None:
        return verified_checkpoint(find())
    # Rank 0 chooses it for all: a run that is still training may save another one meanwhile.
    return verified_checkpoint(distributed.on_rank_zero(find), distributed)


def stored_timeout(run_dir: Path) -> float:
    """Return ``training.collective_timeout`` of the run, checkpoint, or export in ``run_dir``, in seconds."""
    return load_run_config(find_model(run_dir).config_folder).training.collective_timeout


class Load(Protocol):
    """Loads the model of a folder on the ranks, with overrides of its settings, as ``load_run`` does."""

    def __call__(
        self,
        folder: Path,
        device: torch.device | str,
        /,
        *,
        overrides: Sequence[str] = (),
        distributed: Distributed,
        shard: bool | None,
    ) -> tuple[RunConfig, Transformer, int]:
        """Return the config, the model, and its number of training steps."""


def evaluate_run(
    run_dir: Path,
    *,
    num_sequences: int | None = None,
    device: str = "auto",
    plan: SparsityPlan | None = None,
    files: Sequence[str] = (),
    forward_of: Callable[[Transformer], Forward] | None = None,
    load: Load = load_run,
    shard: bool | None = None,
) -> Evaluation:
    """Evaluate the newest checkpoint of a run on its validation sequences; any number of ranks can call it together.

    Args:
        run_dir: a run folder, or another folder that ``load`` reads.
        num_sequences: number of validation sequences, evenly spaced; None is ``training.evaluation_rows``.
        device: ``auto``, ``cpu``, or ``cuda``.
        plan: the S of the evaluation; None is that of the run's last step.
        files: files or globs whose text, under the run's tokenizer, replaces the validation sequences.
        forward_of: returns the function that computes the logits of a batch with the model; None is the model's own
            forward pass.
        load: loads the model; ``interop.trained_model.load_trained`` does so from an export, too.
        shard: whether the ranks divide the weights among them, which ``forward_of`` does not support; None: as they did
            in training.

    Raises:
        ConfigError: the plan is for another model, or lacks the thresholds that the run's selection requires.
        DataError: a file cannot be read or contains no text.
    """
    with open_distributed(device, timeout=stored_timeout(run_dir)) as distributed:
        config, model, step = load(run_dir, distributed.device, distributed=distributed, shard=shard)
        if plan is not None:
            plan.check_fits(config.model)
            model.set_sparsity(plan)
        micro_batch_size, sparsity = config.training.micro_batch_size, model.sparsity_plan.mean

        # Called when the model is as it will be evaluated: what decodes copies its weights and its hidden ids.
        make_forward = partial(forward_of or model_forward, model)
        if files:
            tokenizer = load_tokenizer(config.data.tokenizer)
            # As in training: ids without a token get no probability, so that padding of the vocabulary has no effect.
            model.hide_ids(meaningless_ids(config.model, tokenizer))
            text = OwnText(files, config.data, tokenizer)
            batches = text.batches(micro_batch_size, rank=distributed.rank, world_size=distributed.world_size)
            losses = mean_losses(make_forward(), batches, text.num_bytes, distributed)
            return Evaluation(step=step, rows=len(text), **losses, unigram_bits_per_byte=None, sparsity=sparsity)
        num_sequences = num_sequences or config.training.evaluation_rows
        data = load_data(config.data)
        model.hide_ids(meaningless_ids(config.model, data.tokenizer))
        evaluator = Evaluator(
            data, num_sequences=num_sequences, micro_batch_size=micro_batch_size, distributed=distributed
        )
        losses = evaluator(make_forward())
        rows, unigram = len(data.evaluation_sequences(num_sequences)[1]), data.unigram_bits_per_byte()
        return Evaluation(step=step, rows=rows, **losses, unigram_bits_per_byte=unigram, sparsity=sparsity)


def _checksum(batches: Sequence[Batch], counts_T: Tensor) -> int:
    # Without the padding of batches, which differs between layouts.
    tokens_T = torch.cat([batch.tokens_BS.flatten() for batch in batches])
    targets_T = torch.cat([batch.targets_BS.flatten() for batch in batches])
    return zlib.crc32(torch.stack((tokens_T[counts_T], targets_T[counts_T])).numpy().tobytes())


def model_forward(model: Transformer) -> Forward:
    """Return the model's forward pass over whole sequences, on the model's device."""

    def forward(batch: Batch) -> ModelOutput:
        return run_model(model, batch, model.embedding.weight.device, with_stats=False, layer_hook=None)

    return forward


@torch.no_grad()
def _sums(forward: Forward, batches: Sequence[Batch], distributed: Distributed) -> Tensor:
    """Return the sum of the loss over this rank's labels that count and their number, ``(2,)`` in float64."""
    # In float64, so that the result does not depend on the number of batches and ranks that are added.
    sums = torch.zeros(2, dtype=torch.float64, device=distributed.device)
    for batch in batches:
        labels = batch.targets_BS.to(distributed.device).flatten()
        # In fp32: the softmax sums over the whole vocabulary, for which bf16 has too few digits.
        logits_TV = forward(batch).logits_BSV.flatten(0, 1).float()
        # A sum and not the mean: batches and ranks have different numbers of labels that count.
        loss = F.cross_entropy(logits_TV, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        sums += torch.stack((loss.double(), (labels != IGNORED_LABEL).sum().double()))
    return sums
