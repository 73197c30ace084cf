"""One rank of the Megatron backend: model, DDP, optimizer, and Megatron's schedules around the loss closure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import AutoConfig

from tic_megatron.actors.context_parallel import TokenLayout
from tic_megatron.actors.megatron.held import HeldParameters
from tic_megatron.actors.megatron.model import PolicyModel, ResponseTokens, build_model, transformer_config
from tic_megatron.actors.megatron.parameters import LocalWeights
from tic_megatron.actors.megatron.parking import Parked
from tic_megatron.actors.megatron.routing import RouterReplay
from tic_megatron.actors.objective import choose_objective
from tic_megatron.actors.schedule import learning_rate
from tic_megatron.actors.stats import UpdateResult
from tic_megatron.actors.step import LossClosure, PackedInputs
from tic_megatron.config import Settings

INITIAL_LOSS_SCALE = 2.0**12
"""fp16: Megatron's 2**32 overflows in the first updates, and each skipped update wastes a rollout."""


class MegatronBackend:
    """This rank's part of the policy. Process groups must be initialised (`runtime.initialize`)."""

    def __init__(self, settings: Settings, model_path: str, device: torch.device):
        self.settings = settings
        self.device = device
        actor = settings.actor
        self.hf = AutoConfig.from_pretrained(model_path, trust_remote_code=settings.model.trust_remote_code)
        self.config = transformer_config(self.hf, actor)
        self.layout = TokenLayout(
            rank=parallel_state.get_context_parallel_rank(),
            size=actor.context_parallel_size,
            group=parallel_state.get_context_parallel_group() if actor.context_parallel_size > 1 else None,
            sequence_alignment=actor.sequence_alignment,
            sequence_parallel=actor.tensor_parallel_size if self.config.sequence_parallel else 1,
        )
        self.uniform_lengths = not self.config.variable_seq_lengths
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.has_logprobs = parallel_state.is_pipeline_last_stage()
        self.reports = self.has_logprobs and parallel_state.get_tensor_model_parallel_rank() == 0

        parts = self._build_parts()
        self.weights = LocalWeights(parts, self.hf)
        self.weights.load(model_path)
        self.router_replay = RouterReplay(parts, recomputes=actor.recompute == "full") if self._replays_routing else None
        self.model_parts = [self._distribute(part) for part in parts]
        self.reference_parts = self._build_reference(model_path) if settings.algorithm.kl_coefficient > 0 else None
        self.held: HeldParameters | None = None
        self.optimizer = get_megatron_optimizer(self._optimizer_config(), self.model_parts, use_gloo_process_groups=False)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        self.updates_done = 0
        self.updates_applied = 0  # without those that were skipped, which AdamW has not counted
        self._parks = device.type == "cuda" and settings.cluster.colocate
        self._parked: list[Parked] = []

    def _build_parts(self) -> list[PolicyModel]:
        return [part.to(self.device) for part in build_model(self.hf, self.config)]

    def _build_reference(self, model_path: str) -> list[PolicyModel]:
        """The frozen reference policy, in the actor's own layout, so that its log-probs come from the same kernels."""
        parts = self._build_parts()
        LocalWeights(parts, self.hf).load(self.settings.algorithm.reference_path or model_path)
        return [part.requires_grad_(False) for part in parts]

    @property
    def _replays_routing(self) -> bool:
        wanted = self.settings.actor.router_replay
        per_trajectory = not choose_objective(self.settings.algorithm).objective.ratio.per_token
        return bool(self.config.num_moe_experts) and (wanted == "on" or (wanted == "auto" and per_trajectory))

    def _distribute(self, part: PolicyModel) -> DistributedDataParallel:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=self._distributed_optimizer,
            average_in_collective=False,
        )
        return DistributedDataParallel(self.config, ddp, part)

    @property
    def _distributed_optimizer(self) -> bool:
        return self.settings.actor.distributed_optimizer and self.settings.actor.optimizer == "adamw"

    def _optimizer_config(self) -> OptimizerConfig:
        actor = self.settings.actor
        return OptimizerConfig(
            optimizer="adam" if actor.optimizer == "adamw" else "sgd",
            lr=actor.learning_rate,
            min_lr=actor.min_learning_rate,
            weight_decay=actor.weight_decay,
            decoupled_weight_decay=True,
            adam_beta1=actor.adam_beta1,
            adam_beta2=actor.adam_beta2,
            adam_eps=actor.adam_eps,
            sgd_momentum=0.0,
            clip_grad=actor.grad_clip,
            bf16=actor.precision == "bf16",
            fp16=actor.precision == "fp16",
            params_dtype=self.config.params_dtype,
            initial_loss_scale=INITIAL_LOSS_SCALE,
            use_distributed_optimizer=self._distributed_optimizer,
        )

    def forward(self, inputs: list[PackedInputs], *, reference: bool = False) -> list[Tensor]:
        """Log-probs [n] of each micro-batch, forward only, of the policy or of the frozen reference; an empty list on
        stages that have none."""
        collected: dict[int, Tensor] = {}

        def make_closure(index: int):
            def collect(output: tuple[Tensor, Tensor]):
                collected[index] = output[0]
                return output[0].sum(), {}

            return collect

        with torch.no_grad():
            self._run_schedule(inputs, make_closure, reference=reference, forward_only=True)
        return [collected[index] for index in sorted(collected)]

    def hold_parameters(self) -> None:
        """Evaluate the gradients of the updates that follow at the present parameters, until the next call."""
        self.held = HeldParameters(self.model_parts)

    def update(self, inputs: list[PackedInputs], loss: LossClosure) -> UpdateResult:
        """Gradients of the summed loss over all micro-batches and ranks, then one optimizer step.

        Scaling: the closure's loss is already divided by the mini-batch's global totals, so everything that follows must
        only sum. With `calculate_per_token_loss` DDP's factor is 1, for experts too (it sums over DP x CP instead of
        averaging), the schedule neither multiplies by CP nor divides by the number of micro-batches, and 0 reported tokens
        switch off the final division. The ranks of a context-parallel group differentiate the same trajectory terms, each with
        respect to its own tokens, so their sum is the gradient. Under sequence parallelism the norms' partial gradients are
        summed over TP by `finalize_model_grads`.
        """
        no_tokens = torch.zeros((), dtype=torch.int, device=self.device)
        bad_loss = torch.zeros((), device=self.device)

        def make_closure(index: int):
            def closure(output: tuple[Tensor, Tensor]):
                value = loss(index, *output)
                bad_loss.logical_or_(~torch.isfinite(value.detach()))
                return value, no_tokens, {}

            return closure

        for part in self.model_parts:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.held.in_use() if self.held else nullcontext():
            self._run_schedule(inputs, make_closure, forward_only=False)
        return self._step_optimizer(*self._not_finite_anywhere(bad_loss))

    def _not_finite_anywhere(self, bad_loss: Tensor) -> tuple[bool, bool]:
        """Whether a loss, whether a gradient is not finite, on any rank: one all-reduce, so all ranks decide alike.

        Only the last pipeline stage has losses, and a gradient may be bad in one rank's shard only. A finite gradient whose
        norm could overflow counts too: it would be clipped to nothing, and the update made with what the moments remember.
        """
        buffers = [buffer for part in self.model_parts for buffer in (*part.buffers, *part.expert_parallel_buffers)]
        largest = [torch.linalg.vector_norm(b.grad_data, ord=math.inf) for b in buffers]  # of NaN too; needs no copy
        n_elements = sum(b.grad_data.numel() for b in buffers) * torch.distributed.get_world_size()  # or fewer
        bad_gradient = ~(torch.stack(largest) < math.sqrt(torch.finfo(torch.float32).max / n_elements)).all()
        flags = torch.stack([bad_loss.float(), bad_gradient.float()])
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        loss, gradient = flags.tolist()
        return bool(loss), bool(gradient)

    def _step_optimizer(self, bad_loss: bool, bad_gradient: bool) -> UpdateResult:
        rate = learning_rate(self.updates_done, self.settings)
        self.updates_done += 1
        fp16 = self.settings.actor.precision == "fp16"
        if bad_loss or (bad_gradient and not fp16):
            return UpdateResult(0.0, rate, applied=False)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # In fp16 a bad gradient is an infinite one, and the loss scale's: the optimizer skips the update by itself and lowers the
        # scale, if it can be lowered.
        lowest = any(scaler.scale <= scaler.min_scale for scaler in self.grad_scalers)
        applied, grad_norm, _ = self.optimizer.step()
        self._agree_on_loss_scale()
        self.updates_applied += bool(applied)
        return UpdateResult(float(grad_norm or 0.0), rate, bool(applied), overflow=not applied and not lowest)

    def _agree_on_loss_scale(self) -> None:
        """In fp16 with expert parallelism: the experts' optimizer has a loss scale of its own, which an overflow in their
        gradients alone would lower, while the loss is multiplied by the other's. Both take the more careful one."""
        scalers = self.grad_scalers
        if len(scalers) > 1:
            careful = min(scalers, key=lambda s: (s.scale.item(), s._hysteresis_tracker, s._growth_tracker)).state_dict()
            for scaler in scalers:
                scaler.load_state_dict(careful)

    @property
    def grad_scalers(self) -> list[MegatronGradScaler]:
        """Of fp16's loss scaling, one per optimizer, all in the same state."""
        scalers = (getattr(optimizer, "grad_scaler", None) for optimizer in self.optimizer.chained_optimizers)
        return [scaler for scaler in scalers if scaler is not None]

    def _run_schedule(self, inputs: list[PackedInputs], make_closure, *, forward_only: bool, reference: bool = False) -> None:
        """Megatron's pipeline schedule over the micro-batches; `make_closure(index)` makes the last stage's loss function."""
        parts = self.reference_parts if reference else self.model_parts
        latest = 0

        def forward_step(iterator, part):
            nonlocal latest
            latest, packed = next(iterator)
            if self.router_replay is not None and not reference:
                (self.router_replay.record if forward_only else self.router_replay.replay)(packed.routing)
            return self._forward_model(part, packed), make_closure(latest)

        iterators = [iter(enumerate(inputs)) for _ in parts]
        try:
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(parts) > 1 else iterators[0],
                model=parts,
                num_microbatches=len(inputs),
                seq_length=max(sum(packed.lengths) for packed in inputs),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        except torch.OutOfMemoryError as error:
            raise MemoryError(self._out_of_memory(inputs, latest)) from error

    def _out_of_memory(self, inputs: list[PackedInputs], index: int) -> str:
        actor = self.settings.actor
        advice = f"lower actor.max_tokens_per_microbatch (now {actor.max_tokens_per_microbatch}; at least the longest sequence, "
        advice += f"{self.settings.max_sequence_tokens})"
        if actor.recompute != "full":
            advice += f", or set actor.recompute full (now {actor.recompute})"
        return (
            f"out of memory in micro-batch {index + 1} of {len(inputs)} ({len(inputs[index].response_lengths)} responses, "
            f"{sum(inputs[index].lengths)} tokens over {actor.context_parallel_size} context-parallel ranks): {advice}, "
            "or raise actor.context_parallel_size or actor.tensor_parallel_size"
        )

    def _forward_model(self, part, packed: PackedInputs):
        starts = torch.tensor([0, *packed.lengths], device=self.device).cumsum(0).to(torch.int32)
        longest = max(packed.lengths)
        response = ResponseTokens(
            packed.positions,
            packed.targets,
            self.settings.rollout.temperature,
            self.settings.actor.logprob_chunk_tokens,
        )
        return part(
            packed.input_ids[None],
            packed.position_ids[None],
            attention_mask=None,
            labels=response,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=starts,
                cu_seqlens_kv=starts,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
                cp_group=parallel_state.get_context_parallel_group(),
            ),
        )

    def release_optimizer(self) -> None:
        """Give up the memory of gradients and optimizer state; their values wait on the host. Nothing happens on a CPU."""
        if self._parks:
            self.held = None
            self._parked += [Parked(self._gradients(), keep_values=False), Parked(self._optimizer_tensors())]
            torch.cuda.empty_cache()

    def release_parameters(self) -> None:
        """Give up the memory of the parameters, the reference policy's too; their values wait on the host."""
        if self._parks:
            modules = [*self.model_parts, *(self.reference_parts or [])]
            self._parked.append(Parked(p.data for module in modules for p in module.parameters()))
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Take all memory back that was given up."""
        for parked in self._parked:
            parked.restore()
        self._parked = []

    def _gradients(self) -> Iterator[Tensor]:
        for part in self.model_parts:
            for buffer in (*part.buffers, *part.expert_parallel_buffers):
                yield buffer.grad_data

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Its moments, and the main parameters where they are not the model's own memory."""
        own = {p.data.untyped_storage().data_ptr() for part in self.model_parts for p in part.parameters()}
        for optimizer in self.optimizer.chained_optimizers:
            main = [p.data for group in optimizer.optimizer.param_groups for p in group["params"]]
            moments = [v for state in optimizer.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
            yield from (t for t in main if t.untyped_storage().data_ptr() not in own)
            yield from (t for t in moments if t.device == self.device)

    def load_weights(self, directory: str | Path) -> None:
        """Read the parameters from a Hugging Face directory, and the optimizer's main copies with them."""
        self.weights.load(directory)
        self.optimizer.reload_model_params()
