"""Coefficients of the auxiliary loss that follow the drop rates, layer by layer, while a Trainer trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..configuration_skywork import SkyworkMoeConfig
from ..modeling_skywork_moe import SkyworkMoeForCausalLM, share_of_step
from .picture import draw_router
from .router_load import RouterLoad, balanced_drop_rate, load_of_step, router_sums

logger = logging.get_logger(__name__)

PREFIX = "router/"
FIGURE = "router.png"


def adapted(coefficients: torch.Tensor, drop_rates: torch.Tensor, config: SkyworkMoeConfig) -> torch.Tensor:
    """The coefficients after a step (tech report of Skywork-MoE, eq. 7-9): alpha_hat = min(xi * d, alpha_max), and
    alpha = beta * alpha + (1 - beta) * alpha_hat.

    Args:
        coefficients: float64 [MoE layers], alpha before the step.
        drop_rates: float64 [MoE layers], d of the step.

    Returns:
        float64 [MoE layers].
    """
    beta = config.router_aux_loss_beta
    target = (config.router_aux_loss_xi * drop_rates).clamp_max(config.router_aux_loss_alpha_max)
    return beta * coefficients + (1 - beta) * target


class AdaptiveAuxLossCallback(TrainerCallback, ExportableState):
    """Lets the coefficient of each MoE layer's auxiliary loss follow the layer's drop rate (tech report of
    Skywork-MoE, eq. 4 and 7-9), for any Trainer: `Trainer(..., callbacks=[AdaptiveAuxLossCallback()])`.

    It makes the model add the auxiliary loss while it trains, not while it evaluates. After each step of the optimiser
    its drop rates change the coefficients; where they begin and how they change is in the model's config
    (`router_aux_loss_coef`, `_xi`, `_alpha_max`, `_beta` and `router_capacity_factor`). A step's drop rate is that of
    all its tokens in a process, in however many batches they came, and the mean over the processes, by their tokens.
    Checkpoints of the Trainer hold the coefficients, and training resumes with them; a second `train()` without a
    checkpoint begins with those of the config again.

    Logged with the loss: `lm_loss`, the loss without the auxiliary one, and under `router/`, for each layer and as
    means over the layers, the coefficient after the last step and, over the steps since the last log as the loss is,
    what `RouterLoad.statistics` has, such as `aux_loss`, the auxiliary loss without its coefficient. The console shows
    the means over the layers. It warns once where a step has so few tokens that chance alone takes the coefficients to
    their ceiling. At the end `router.png` in the output folder shows the gates' distributions, the ratios and
    the coefficients (report, figures 2-4); it needs matplotlib, the `figures` extra.

    Raises, when training begins:
        ValueError: the model is no Skywork-MoE with a language-model head, one process would train on several GPUs
            (nn.DataParallel), the Trainer smooths labels, so that the model computes no loss, or a resumed checkpoint
            is of another number of layers; in the first step, that something replaced the model's loss, or that no
            gradient of it reaches the gates.
    """

    def __init__(self) -> None:
        self.coefficients: list[float] | None = None  # alpha of each MoE layer
        self._model: Any = None
        self._sums: torch.Tensor | None = None  # of the step's batches so far
        self._last: RouterLoad | None = None  # of the last whole step, of all processes
        self._unlogged: RouterLoad | None = None  # of the steps since the last log
        self._added: list[float] = []  # to the loss of each of these steps by the auxiliary loss
        self._computes_loss = True  # the model, so that its loss has the auxiliary one
        self._handles: list[Any] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"coefficients": self.coefficients}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"One process trains on {args.n_gpu} GPUs, whose routing cannot be counted together: start one "
                "process for each (torchrun or accelerate launch), or name one in CUDA_VISIBLE_DEVICES."
            )
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} makes the Trainer compute the loss itself, "
                "without the auxiliary loss: set it to 0, or leave AdaptiveAuxLossCallback out."
            )
        self._remove_hooks()  # of a training that was broken off
        self._model, self._last = _moe_of(model), None
        self.coefficients = self._first_coefficients(state)
        # Where a checkpoint was written without this callback, the Trainer misses its place.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._set_coefficients()
        self._handles = [
            self._model.register_forward_pre_hook(_ask_for_router_logits, with_kwargs=True),
            self._model.register_forward_hook(self._observe, with_kwargs=True),
        ]
        model.router_metrics = self._take_metrics

    def _first_coefficients(self, state: Any) -> list[float]:
        config, layers = self._model.config, len(moe_layers(self._model.config))
        stored = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("coefficients")
        if state.global_step == 0 or stored is None:
            return [config.router_aux_loss_coef] * layers
        if len(stored) != layers:
            raise ValueError(
                f"The checkpoint to resume holds coefficients of the auxiliary loss for {len(stored)} MoE layers, the "
                f"model has {layers}: resume with the model that was trained, or start anew."
            )
        return list(stored)

    def _set_coefficients(self) -> None:
        self._model.aux_loss_coefficients = torch.tensor(self.coefficients, device=self._model.device)

    def _observe(self, model: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        if not model.training:
            return
        if not hasattr(outputs, "router_logits"):
            raise ValueError(
                f"The model's forward was replaced by one that computes another loss ({type(outputs).__name__}, as "
                "TRL's SFTTrainer does), which knows no coefficients by layer: train with transformers' Trainer, or "
                "leave AdaptiveAuxLossCallback out."
            )
        if outputs.router_logits is None:
            return
        if not any(logits.requires_grad for logits in outputs.router_logits) and torch.is_grad_enabled():
            raise ValueError(
                "No gradient of the auxiliary loss reaches the gates or what is below them. If activations are "
                'checkpointed, pass activation_checkpointing_kwargs={"use_reentrant": False}; if nothing there is '
                "trained, leave AdaptiveAuxLossCallback out."
            )
        self._computes_loss = outputs.loss is not None
        if not self._computes_loss:
            logger.warning_once(
                "The model gets no labels (as with `compute_loss_func`), so it computes no loss: unless yours adds "
                "the auxiliary loss, the gates are not balanced, though its coefficients adapt."
            )
        share = share_of_step(**kwargs) if self._computes_loss else 1.0
        sums = router_sums(outputs.router_logits, model.config, kwargs.get("attention_mask"), share)
        self._sums = sums if self._sums is None else self._sums + sums

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sums is None:
            return
        load = load_of_step(self._sums, self._model.config)
        sums: Any = reduce(load.sums, reduction="sum")
        is_first, load, self._sums = self._last is None, RouterLoad(sums.cpu(), load.top_k), None
        if is_first and state.is_world_process_zero:
            _warn_of_few_tokens(round(load.tokens[0].item() / args.world_size), self._model.config)
        self._last, self._unlogged = load, load if self._unlogged is None else self._unlogged + load
        before = torch.tensor(self.coefficients, dtype=torch.float64)
        self._added.append((before * load.aux_losses).sum().item())
        self.coefficients = adapted(before, load.drop_rates, self._model.config).tolist()
        self._set_coefficients()

    def _take_metrics(self, loss: float) -> dict[str, float]:
        """What is logged of the steps since this was called before, whose mean loss is `loss`."""
        if self._unlogged is None:
            return {}
        statistics, added = self._unlogged.statistics(), sum(self._added) / len(self._added)
        self._unlogged, self._added = None, []
        per_layer = {"coefficient": torch.tensor(self.coefficients, dtype=torch.float64), **statistics}
        metrics = {"lm_loss": loss - added} if self._computes_loss else {}
        metrics |= {f"{PREFIX}{name}": values.mean().item() for name, values in per_layer.items()}
        for row, layer in enumerate(moe_layers(self._model.config)):
            metrics |= {f"{PREFIX}layer_{layer:02}/{name}": values[row].item() for name, values in per_layer.items()}
        return metrics

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Whatever reports was called before this, by `ReportRouterLoad`; the console comes after.
        for name in [name for name in logs or {} if name.startswith(f"{PREFIX}layer_")]:
            del logs[name]

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._remove_hooks()
        self._model.aux_loss_coefficients = None
        model.router_metrics = None
        if state.is_world_process_zero and self._last is not None:
            self._draw(state, Path(args.output_dir) / FIGURE)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums, self._unlogged, self._added = [], None, None, []

    def _draw(self, state: Any, path: Path) -> None:
        assert self._last is not None
        if importlib.util.find_spec("matplotlib") is None:
            logger.warning(f"{path.name} is not drawn: it needs matplotlib (pip install skywork-hf[figures]).")
            return
        draw_router(state.log_history, self._last, moe_layers(self._model.config), path)


class ReportRouterLoad(TrainerCallback):
    """Puts what `AdaptiveAuxLossCallback` measured into the Trainer's logs before tensorboard and the like see them:
    these are called before any callback of the user's, so this one is among the Trainer's default callbacks."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        take_metrics = getattr(model, "router_metrics", None)
        if take_metrics and "loss" in (logs or {}):
            metrics = take_metrics(logs["loss"])
            logs.update(metrics)
            state.log_history[-1].update(metrics)


def moe_layers(config: SkyworkMoeConfig) -> list[int]:
    """The numbers of the MoE layers, from 0."""
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def _warn_of_few_tokens(tokens: int, config: SkyworkMoeConfig) -> None:
    rate = balanced_drop_rate(tokens, config) if tokens else 0.0
    if config.router_aux_loss_xi * rate > config.router_aux_loss_alpha_max:
        logger.warning_once(
            f"A step has {tokens} tokens in a process, of which {config.num_local_experts} experts (top "
            f"{config.num_experts_per_tok}) with router_capacity_factor={config.router_capacity_factor} drop "
            f"{rate:.1%} even where the gates are balanced. That is above alpha_max / xi = "
            f"{config.router_aux_loss_alpha_max / config.router_aux_loss_xi:.1%}, so that the coefficients of the "
            f"auxiliary loss go to their ceiling, {config.router_aux_loss_alpha_max}, whatever the gates do: give a "
            "step more tokens (larger batches, more gradient accumulation), or raise router_capacity_factor."
        )


def _moe_of(model: Any) -> SkyworkMoeForCausalLM:
    """The model itself, below adapters and wrappers."""
    for module in model.modules():
        if isinstance(module, SkyworkMoeForCausalLM):
            return module
    raise ValueError(
        f"AdaptiveAuxLossCallback trains SkyworkMoeForCausalLM; {type(model).__name__} holds none: leave it out."
    )


def _ask_for_router_logits(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    return (args, {**kwargs, "output_router_logits": True}) if model.training else None
