"""What `prune.py` can be told. No torch here: `--help` answers at once."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.settings import is_explicit, is_flag

# What each method takes: a share of parameters, whole units or layers of which go, or a share of zeros.
SHRINKING = ("structured", "drop_layers")
SPARSE = ("magnitude", "wanda", "ria", "sparsegpt")
LORA_LR = 2e-4  # of the guide to recovery; 1e-5, its rate for all parameters, moves LoRA's few too little


@dataclass
class PruneSettings:
    """prune.py: a model made smaller or sparser, recovered where asked, and compared with what it was."""

    base_model: str = ""
    """The model to prune: a checkpoint (.pt), a Hugging Face folder, a GGUF file, or a Hub name (owner/name)."""
    save_ckpt_log_name: str = "prune"
    """Name of the run: its log, report and recovery go to logs/NAME."""
    method: Literal["structured", "drop_layers", "magnitude", "wanda", "ria", "sparsegpt", "none"] = "structured"
    """structured (kv groups and MLP channels go), drop_layers (whole layers go), a way to choose zeros, or none:
    recover a model that was pruned before."""
    pruning_ratio: float = 0.25
    """structured, drop_layers: share of the parameters of the chosen kinds in the chosen layers that goes."""
    sparsity: float = 0.5
    """magnitude, wanda, ria, sparsegpt: share of the weights of the chosen layers that becomes zero."""
    pattern: Literal["unstructured", "2:4", "4:8", "block"] = "unstructured"
    """Which weights may be zero together; block: squares of --block_size."""
    block_size: int = 16
    """Side of a square of --pattern block; squares at the edges may be smaller."""
    allocation: Literal["uniform", "unbalanced", "owl"] = "unbalanced"
    """Every layer the same share, or the less important more, or (zeros only) by outliers. Default: unbalanced; for
    zeros uniform, but for blocks by sparsegpt."""
    importance: Literal["obs", "taylor", "fisher", "activation"] = "obs"
    """structured: what a unit is worth: the rise of the loss when the others make up for it (OBS), its first-order or
    second-order change without that, or the norm of its activations."""
    prune_mlp: bool = False
    """structured: the MLP's channels go too, not only attention's kv groups."""
    budget: Literal["parameters", "flops", "latency"] = "parameters"
    """structured: what --pruning_ratio is a share of; latency is measured on this machine."""
    protect_first: int = 0
    """structured: so many of the first layers keep all they have."""
    protect_last: int = 0
    """structured: so many of the last layers keep all they have."""
    min_groups: int = 1
    """structured: kv groups that every layer keeps; 0 = its attention may go."""
    channel_multiple: int = 1
    """structured: every layer keeps a multiple of so many channels, which kernels like."""
    layer_start: int = 0
    """The first layer that may lose something."""
    layer_end: int | None = None
    """The first layer behind them that may not. Default: all may."""
    refit: bool = True
    """structured, and sparsegpt but for blocks: what remains is fitted again to the dense model's outputs."""

    calibration: str | None = None
    """Text that importance is measured on: a file (.txt, .jsonl with "text", .parquet), a set made by prepare_data.py,
    or a Hub set such as c4. Default: the embedded text."""
    importance_samples: int = 64
    """Windows of it."""
    importance_seq_len: int = 512
    """Tokens of each, at most the model's context."""
    gradient_samples: int | None = None
    """How many of them gradients are taken on, where a method needs them. Default: 8, for blocks 32."""
    eval_text: str | None = None
    """Text that perplexity is measured on, as --calibration. Default: the part of the embedded text kept for it."""
    eval_samples: int = 16
    """Windows of it, evenly spread over the text, and of validation while recovering; 0 = all."""
    eval_seq_len: int = 512
    """Tokens of each, at most the model's context."""

    out: str | None = None
    """The pruned model. Default, with --save_model: logs/NAME/pruned.pt. A recovered one stands beside it."""
    save_model: bool = False
    """Keep the pruned model."""
    compact: bool = False
    """Store a sparse model without its zeros; it opens like any other."""
    test_after_prune: bool = False
    """Compare it with what it was: size, memory, speed, answers; perplexity is measured in any case."""
    report: str | None = None
    """Write that comparison to this JSON file, and a page beside it. Default: logs/NAME/report.json."""
    prompts: str | None = None
    """File of prompts for the answers, one a line; the first three are put. Default: three of our own."""
    speed_runs: int = 5
    """Generations of each model, one after the other in turn, whose median is the speed; 0 = speed is not measured."""
    cache_dir: str = "logs/statistics"
    """Where statistics of the calibration text are kept for the next run on the same model and text."""
    cache_statistics: bool = True
    """Keep them (--no_cache_statistics: a layer of a 7B model is a gigabyte)."""

    rounds: int = 1
    """Prune and recover in so many rounds, each a part of the way. Needs --finetune."""
    finetune: bool = False
    """Recover what pruning lost."""
    finetune_method: Literal["full", "lora", "freeze", "progressive"] = "full"
    """What trains. LoRA leaves its adapter and the merged model."""
    objective: Literal["sft", "distill"] = "sft"
    """Recovery on the text itself, or by what the unpruned model predicts on it."""
    teacher: str | None = None
    """distill: the model to learn from. Default: the base model; of a pruned one, what it was pruned from."""
    distill_hard: float = 0.0
    """distill: share of the ordinary loss."""
    distill_hidden: float = 0.0
    """distill: weight of the distance between the streams behind each layer, where no layer is gone."""
    finetune_data: str | None = None
    """Text or records to recover on: a file, a prepared set, or a set of the Hub. Default: the embedded text."""
    finetune_lr: float = 1e-5
    """Peak learning rate (LoRA: 2e-4); it rises over the warm-up and falls to 0 in a straight line."""
    finetune_epochs: float = 1.0
    """Passes over the samples."""
    finetune_samples: int = 500
    """Windows of text, or records."""
    finetune_batch_size: int = 1
    """Windows in one micro-batch."""
    finetune_seq_len: int = 512
    """Tokens of a window, at most the model's context."""
    finetune_grad_accum: int = 4
    """Micro-batches of one step."""
    finetune_max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 = not."""
    finetune_weight_decay: float = 0.01
    """Decay of the matrices."""
    finetune_warmup_steps: int = 0
    """Steps of linear warm-up."""
    finetune_checkpoint_interval: int = 100
    """Steps between the checkpoints that an interrupted recovery goes on from."""
    lora_r: int = 8
    """LoRA: rank."""
    lora_alpha: float = 16.0
    """LoRA: the update is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """LoRA: dropout on the input of A."""
    lora_target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """LoRA: layers, such as q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj, or all-linear."""
    seed: int = 1337
    """Seed of the choice of windows, and of recovery."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    @property
    def log_name(self) -> str:
        """--save_ckpt_log_name; with --out alone, the file's."""
        if self.out is not None and not is_explicit(self, "save_ckpt_log_name"):
            return Path(self.out).stem
        return self.save_ckpt_log_name

    @property
    def folder(self) -> Path:
        """logs/NAME."""
        return Path("logs") / self.log_name

    @property
    def pruned_path(self) -> Path:
        """Where the pruned model goes."""
        return Path(self.out) if self.out is not None else self.folder / "pruned.pt"

    @property
    def recovered_path(self) -> Path:
        """pruned.pt -> recovered.pt, a.pt -> a-recovered.pt, beside it; where nothing is pruned --out itself."""
        path = self.pruned_path
        if self.method == "none" and self.out is not None:
            return path
        stem = path.stem.replace("pruned", "recovered") if "pruned" in path.stem else f"{path.stem}-recovered"
        return path.with_name(stem + path.suffix)

    @property
    def report_path(self) -> Path:
        """Where the comparison goes as JSON."""
        return Path(self.report) if self.report is not None else self.folder / "report.json"

    @property
    def compares(self) -> bool:
        """Whether the result is compared with the base."""
        return self.test_after_prune or self.report is not None


def with_changes(settings: PruneSettings, changes: dict[str, Any]) -> PruneSettings:
    """The settings with some replaced, which then are explicit ones."""
    replaced = dataclasses.replace(settings, **changes)
    names = getattr(settings, "explicit_names", None)
    if names is not None:
        object.__setattr__(replaced, "explicit_names", names | set(changes))
    return replaced


def check(settings: PruneSettings) -> None:
    """Raises ValueError for what cannot be meant, before anything is read."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "prune.py is one process: prune without torchrun and --finetune, then recover the result with torchrun ... "
            "finetune_dolly.py --pretrained_checkpoint"
        )
    if not settings.base_model:
        raise ValueError("no model: name the one to prune with --base_model")
    if not (settings.save_model or settings.out):
        raise ValueError("nothing would be kept: add --save_model (logs/NAME/pruned.pt) or --out FILE.pt")
    for path in (settings.pruned_path, settings.recovered_path):
        if path.suffix != ".pt":
            raise ValueError(f"--out {settings.out}: expected a name that ends in .pt")
    _check_shares(settings)
    _refuse_idle_flags(settings)
    _check_numbers(settings)
    if settings.method == "none" and not settings.finetune:
        raise ValueError("--method none only recovers: add --finetune")
    if settings.rounds > 1 and not settings.finetune:
        raise ValueError(
            f"--rounds {settings.rounds}: without recovery between them rounds change nothing: add --finetune"
        )
    if settings.rounds > 1 and (settings.method in ("none", "drop_layers") or settings.pattern in ("2:4", "4:8")):
        raise ValueError(f"--rounds {settings.rounds}: there is nothing between all and nothing to prune by and by")
    if settings.objective == "distill" and not settings.finetune:
        raise ValueError("--objective distill is a way to recover: add --finetune")
    if settings.report is not None and Path(settings.report).suffix != ".json":
        raise ValueError(f"--report {settings.report}: expected a name that ends in .json")


# Settings that say something to some methods only.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "pruning_ratio": SHRINKING,
    "layer_start": (*SHRINKING, *SPARSE),
    "layer_end": (*SHRINKING, *SPARSE),
    "refit": ("structured", "sparsegpt"),
    "prune_mlp": ("structured",),
    "importance": ("structured",),
    "budget": ("structured",),
    "protect_first": ("structured",),
    "protect_last": ("structured",),
    "min_groups": ("structured",),
    "channel_multiple": ("structured",),
    "sparsity": SPARSE,
    "pattern": SPARSE,
    "block_size": SPARSE,
    "allocation": ("structured", *SPARSE),
    "compact": (*SPARSE, "none"),
}
OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
OF_DISTILLATION = ("teacher", "distill_hard", "distill_hidden")
_OF_RECOVERY = (
    *("finetune_method", "finetune_lr", "finetune_epochs", "finetune_samples", "finetune_batch_size"),
    *("finetune_seq_len", "finetune_grad_accum", "finetune_max_grad_norm", "finetune_weight_decay"),
    *("finetune_warmup_steps", "finetune_checkpoint_interval", *OF_LORA, *OF_DISTILLATION),
)


def _check_shares(settings: PruneSettings) -> None:
    for name, methods in _ONLY_FOR.items():
        if settings.method not in methods and is_explicit(settings, name):
            instead = {"pruning_ratio": "; use --sparsity", "sparsity": "; use --pruning_ratio"}.get(name, "")
            raise ValueError(
                f"--{name} says nothing to --method {settings.method}{instead if settings.method != 'none' else ''}"
            )
    for name in ("pruning_ratio", "sparsity"):
        if not 0 < getattr(settings, name) < 1:
            raise ValueError(f"--{name} {getattr(settings, name)}: expected a share between 0 and 1, such as 0.25")
    if settings.pattern in ("2:4", "4:8") and settings.sparsity != 0.5:
        raise ValueError(f"--sparsity {settings.sparsity}: --pattern {settings.pattern} is half zeros: leave it out")
    if settings.pattern != "block" and is_explicit(settings, "block_size"):
        raise ValueError(f"--block_size says nothing to --pattern {settings.pattern}: add --pattern block")
    if second_order_blocks(settings) and is_explicit(settings, "refit"):
        raise ValueError("--no_refit says nothing to --pattern block: blocks are fitted again in any case")
    if settings.allocation == "owl" and settings.method == "structured":
        raise ValueError("--allocation owl is for zeros: --method structured takes uniform or unbalanced")


def _refuse_idle_flags(settings: PruneSettings) -> None:
    """A flag that this run would not look at. A file is a recipe, of which flags may switch a part off."""
    method, objective = settings.finetune_method, settings.objective
    for names, used, why in (
        (_OF_RECOVERY, settings.finetune, "without recovery: add --finetune"),
        (OF_LORA, method == "lora", f"to --finetune_method {method}: add --finetune_method lora"),
        (OF_DISTILLATION, objective == "distill", f"to --objective {objective}: add --objective distill"),
        (("prompts",), settings.compares, "without a comparison: add --test_after_prune"),
    ):
        idle = [name for name in names if is_flag(settings, name) and not used]
        if idle:
            raise ValueError(f"--{idle[0]} says nothing {why}")


def _check_numbers(settings: PruneSettings) -> None:
    least = {
        "importance_samples": 1, "importance_seq_len": 2, "gradient_samples": 1, "eval_samples": 0, "eval_seq_len": 2,
        "block_size": 1, "speed_runs": 0, "rounds": 1, "finetune_samples": 1, "layer_start": 0, "finetune_seq_len": 2,
        "protect_first": 0, "protect_last": 0, "min_groups": 0, "channel_multiple": 1, "finetune_batch_size": 1,
        "finetune_grad_accum": 1, "finetune_warmup_steps": 0, "finetune_checkpoint_interval": 0, "lora_r": 1,
    }  # fmt: skip
    for name, lowest in least.items():
        if getattr(settings, name) is not None and getattr(settings, name) < lowest:
            raise ValueError(f"--{name} {getattr(settings, name)}: expected at least {lowest}")
    _check_rates(settings)
    if settings.layer_end is not None and settings.layer_end <= settings.layer_start:
        raise ValueError(
            f"--layer_start {settings.layer_start} --layer_end {settings.layer_end}: layers from the first up to, and "
            "without, the last: the range is empty"
        )


def _check_rates(settings: PruneSettings) -> None:
    """What recovery would refuse under the names that the training loop has for it, and after the pruning."""
    for name in ("finetune_lr", "finetune_max_grad_norm", "finetune_weight_decay", "distill_hidden"):
        value = getattr(settings, name)
        if not value >= 0 or (value == math.inf and name != "finetune_max_grad_norm"):  # NaN too
            raise ValueError(f"--{name} {value}: expected a number of at least 0")
    for name in ("finetune_epochs", "lora_alpha"):
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"--{name} {getattr(settings, name)}: expected more than 0")
    if not 0 <= settings.lora_dropout < 1:
        raise ValueError(f"--lora_dropout {settings.lora_dropout}: expected a share from 0 to below 1")
    if not 0 <= settings.distill_hard <= 1:
        raise ValueError(f"--distill_hard {settings.distill_hard}: expected 0 to 1")


def check_layers(settings: PruneSettings, n_layer: int) -> tuple[int, int]:
    """The layers [first, behind the last) that may lose something. ValueError where the model has fewer."""
    end = n_layer if settings.layer_end is None else settings.layer_end
    for name, value, most in (("layer_start", settings.layer_start, n_layer - 1), ("layer_end", end, n_layer)):
        if value > most:
            raise ValueError(f"--{name} {value}: the model has {n_layer} layers, expected at most {most}")
    return settings.layer_start, end


def allocation(settings: PruneSettings) -> str:
    """--allocation, or what is best for the method: zeros by scores alone lose where shares differ by layer."""
    if is_explicit(settings, "allocation") or settings.method not in SPARSE:
        return settings.allocation
    return "unbalanced" if second_order_blocks(settings) else "uniform"


def second_order_blocks(settings: PruneSettings) -> bool:
    """Whether blocks go by the loss that second derivatives foresee, see model/pruning/blocks.py."""
    return settings.method == "sparsegpt" and settings.pattern == "block"


def reorders(settings: PruneSettings) -> bool:
    """Whether blocks may bring the network's units into another order; a teacher's streams are compared in the old."""
    return second_order_blocks(settings) and settings.distill_hidden == 0


def gradient_samples(settings: PruneSettings) -> int:
    """--gradient_samples, or 32 for blocks; units did no better with 32 than with 8."""
    if settings.gradient_samples is not None:
        return settings.gradient_samples
    return 32 if second_order_blocks(settings) else 8


def finetune_lr(settings: PruneSettings) -> float:
    """--finetune_lr, or LoRA's own."""
    if settings.finetune_method == "lora" and not is_explicit(settings, "finetune_lr"):
        return LORA_LR
    return settings.finetune_lr
