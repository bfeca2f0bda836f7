"""Beside step 14: the library's loop, and its differences from ours, an override for each.

Left alone, it has no Muon, decays embeddings too, cuts batches by process and epoch rather than by
number, keeps its sum of losses in float32, replaces a NaN loss by an average and lets a NaN
gradient into the weights, forgets on resuming how long the early stopping has waited, deletes the
last checkpoint in favour of the best, and writes in place: a full disk leaves half of a checkpoint,
which it would then resume.

Proof: tests/test_trainer.py.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from hf_bridge import runs
from hf_bridge.batches import IGNORED
from hf_bridge.files import writing
from hf_bridge.model import GPT
from hf_bridge.muon import Muon
from hf_bridge.optimize import Batch, Record, TrainConfig, causal_loss, check_batch, with_positions


class ExactTrainer(Trainer):
    """Trains a GPT on numbered batches as minigpt does, and writes its folder."""

    def __init__(
        self,
        model: GPT,
        batches: Callable[[int], Batch],
        config: TrainConfig,
        folder: Path,
        evaluate: Callable[[GPT], Record] | None,
        save: Callable[[GPT, Path], None] | None,
        checkpoint: Path | None,
    ):
        plain = model.hf.get_base_model() if isinstance(model.hf, PeftModel) else model.hf
        plain.loss_type = "ForCausalLM"  # so that a row's first label is not counted
        use_cpu = model.device.type == "cpu"
        super().__init__(
            model.hf,
            config.arguments(str(folder), use_cpu=use_cpu, evaluates=evaluate is not None),
            eval_dataset=[],  # not looked at: `evaluate` knows its own
            compute_loss_func=_mean_loss,
            optimizer_cls_and_kwargs=_muon(config) if config.optim == "muon" else None,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.gpt, self.batches, self.config, self.folder = model, batches, config, folder
        self.evaluator = evaluate or (lambda model: {})
        self.saver = save or GPT.save_pretrained
        self.losses: list[Tensor] = []
        self.tokens, self.started = 0, time.perf_counter()
        self.first = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
        self.journal = runs.Log(folder, self.first, writes=self.is_world_process_zero())
        if self._has_waited_enough():
            self.args.max_steps = self.first  # the run is over: only its weights are loaded

    def get_train_dataloader(self) -> DataLoader:
        """Batches by their numbers, each process taking its rows."""
        each, steps = self.config.gradient_accumulation_steps, self.args.max_steps
        # As many as a whole run needs, or the library would count its epochs otherwise.
        numbers: Any = range(self.first * each, (self.first + steps) * each)
        return DataLoader(numbers, batch_size=None, collate_fn=self._share)

    def _share(self, i: Any) -> Batch:
        batch, world = self.batches(i), self.args.world_size
        check_batch(self.gpt, batch)  # the library's own complaint is an IndexError
        batch = with_positions(batch)
        if len(batch["input_ids"]) < world:
            rows = len(batch["input_ids"])
            raise ValueError(f"a batch needs a row for each of {world} processes, got {rows}")
        return {name: tensor[self.args.process_index :: world] for name, tensor in batch.items()}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices that are no embeddings; the library's own choice holds the embeddings too."""
        embeddings = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        }
        return [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in embeddings]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the library's, with a note of how many tokens the step has."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.tokens = int(count)
        if not self.tokens:
            step = self.state.global_step + 1
            raise ValueError(f"step {step} has no token to learn: every label is {IGNORED}")
        return samples, count

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """As the library's, but a loss that is no number stops the run."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        self._check_finite("loss", loss)
        return loss

    def _clip_grad_norm(self, model) -> Tensor:
        """As the library's, but a gradient that is no number stops the run."""
        norm = super()._clip_grad_norm(model)
        self._check_finite("gradient", norm)
        return norm

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not value.isfinite():
            step = self.state.global_step
            i = step * self.config.gradient_accumulation_steps + len(self.losses) - 1
            raise FloatingPointError(
                f"the {what} of step {step + 1} (batch {i}) is {value.item()}: "
                "lower the learning rate, or look at that batch"
            )

    def log(self, logs, start_time=None) -> None:
        """One record a step, with the exact loss."""
        if "loss" not in logs:
            return
        loss = self.accelerator.gather(torch.stack(self.losses).sum()).mean().item()
        now = time.perf_counter()
        self.journal.write(
            {
                "step": self.state.global_step,
                "loss": loss,
                "grad_norm": logs["grad_norm"],
                "learning_rate": logs["learning_rate"],
                "tokens": self.tokens,
                "seconds": now - self.started,
            }
        )
        self.losses, self.started = [], now
        self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> Record:
        """What `evaluate` returns, logged; the best model is saved at once."""
        self.gpt.eval()
        try:
            with torch.inference_mode():
                metrics = {f"eval_{k}": v for k, v in self.evaluator(self.gpt).items()}
        except FloatingPointError as error:
            step = self.state.global_step
            raise FloatingPointError(f"the evaluation after step {step} failed: {error}") from error
        name = self.config.metric_for_best_model
        if f"eval_{name}" not in metrics:
            raise ValueError(f"evaluate must return {name}, got {_told(metrics)}")
        self.journal.write({"step": self.state.global_step, **metrics})
        if self._waited() == 0 and self.is_world_process_zero():
            self.saver(self.gpt, self.folder / runs.BEST)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._has_waited_enough():
            self.control.should_training_stop = True
            self.control.should_save = self.config.save_steps > 0
        self.started = time.perf_counter()
        return metrics

    def _waited(self) -> int:
        """How many evaluations have passed since the best."""
        name = f"eval_{self.config.metric_for_best_model}"
        values = [record[name] for record in self.journal.records if name in record]
        best = (max if self.config.greater_is_better else min)(values, default=0)
        return len(values) - 1 - values.index(best) if values else 0

    def _has_waited_enough(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self._waited()

    def _save_checkpoint(self, model, trial) -> None:
        """As the library's, but whole or not at all; then the older ones go."""
        if not self.args.should_save:
            super()._save_checkpoint(model, trial)
            return
        with writing(self.folder) as part:
            self.args.output_dir = str(part)
            super()._save_checkpoint(model, trial)
        self.args.output_dir = str(self.folder)
        rotate_checkpoints(str(self.folder), save_total_limit=1)

    def _save_rng_state(self, output_dir) -> None:
        """Nothing: each step has a seed of its own."""

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """As the library's, but peft must not ask the base's files whether words were added."""
        if isinstance(self.model, PeftModel):
            if self.args.should_save:
                self.model.save_pretrained(output_dir, save_embedding_layers=False)
        else:
            super().save_model(output_dir, _internal_call)


class Steps(TrainerCallback):
    """A step's own seed for dropout, the evaluation at the end, and the progress bar."""

    def __init__(self, seed: int, progress: bool):
        from tqdm import tqdm

        self.seed, self.progress = seed, progress
        self.bar = tqdm(unit="step", disable=None if progress else True)

    def on_train_begin(self, args, state, control, **_others) -> None:
        self.bar.reset(total=state.max_steps)
        self.bar.update(state.global_step)

    def on_step_begin(self, args, state, control, **_others) -> None:
        torch.manual_seed((args.process_index << 40) + self.seed * 1_000_003 + state.global_step)

    def on_log(self, args, state, control, logs=None, **_others) -> None:
        self.bar.update()
        rate = f"{logs['learning_rate']:.1e}"
        self.bar.set_postfix({"loss": f"{logs['loss']:.3f}", "lr": rate})

    def on_step_end(self, args, state, control, **_others) -> None:
        if args.eval_strategy != "no" and state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **_others) -> None:
        if self.progress:
            self.bar.write(f"step {state.global_step}  {_told(metrics)}", file=sys.stderr)

    def on_train_end(self, args, state, control, **_others) -> None:
        self.bar.close()


def _muon(config: TrainConfig) -> tuple[type[Muon], dict[str, Any]]:
    """The optimizer that the library does not have, and its numbers."""
    return Muon, {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "fused": True,
    }


def _mean_loss(outputs, labels, num_items_in_batch=None) -> Tensor:
    return causal_loss(outputs, labels) / num_items_in_batch


def _told(metrics: Record) -> str:
    return "  ".join(f"{k.removeprefix('eval_')} {v:,.4g}" for k, v in metrics.items())
