"""What a run can be told: the settings of `train_gpt2.py` and `finetune_dolly.py`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Interval = int | Literal["epoch"]
Device = str


@dataclass
class RunSettings:
    """Settings that pretraining and fine-tuning share."""

    # Two settings of one quantity: the first, where it is given, stands for the second. Both given is an error.
    STANDS_FOR: ClassVar[dict[str, str]] = {
        "epochs": "max_steps",
        "warmup_ratio": "warmup_steps",
        "grad_accum_steps": "total_batch_size",
    }

    data_dir: str = "fineweb-edu"
    """Folder of token shards made by prepare_data.py; a bare name means data/NAME."""
    log_dir: str = "logs"
    """Folder of the run: model_NNNNN.pt, metrics.jsonl, config.yaml, training.log, curves.png."""
    preset: str = "124M"
    """Network to start from random weights: tiny, 124M, 350M, 774M, 1558M, or llama-tiny ... llama-1558M."""
    block_size: int = 1024
    """Context length in tokens."""
    batch_size: int = 16
    """Windows in one micro-batch of one process."""
    total_batch_size: int = 524288
    """Tokens of one optimizer step over all processes; gives the number of accumulation steps."""
    grad_accum_steps: int | None = None
    """Micro-batches of one optimizer step in one process; instead of total_batch_size."""
    max_steps: int = 19073
    """Optimizer steps."""
    epochs: float | None = None
    """Passes over the data, fractions allowed; instead of max_steps."""
    packing: bool = True
    """Instruction data: several records in one window, each blind to the others; off pads one record a window."""
    max_samples: int | None = None
    """Use only the first N windows (text) or records (instructions) of the training set."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon on the hidden matrices, AdamW on the rest."""
    max_lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end as a share of the peak (cosine, linear and wsd)."""
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; wsd holds the peak, then falls linearly over the last decay_ratio."""
    warmup_steps: int = 715
    """Steps of linear warm-up."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps; instead of warmup_steps."""
    decay_ratio: float = 0.2
    """Share of all steps in which the wsd schedule falls."""
    beta1: float = 0.9
    """AdamW's decay of the mean (Muon's momentum stays at 0.95)."""
    beta2: float = 0.95
    """AdamW's decay of the square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 turns clipping off (the norm is logged all the same)."""
    dropout: float = 0.0
    """Dropout probability in the network."""
    nan_policy: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step (at most 10 in a row)."""
    spike_guard: float = 0.0
    """A loss of so many standard deviations above the last 64: back to a checkpoint and past its data (6; 0 = off)."""
    eval_interval: Interval = 250
    """Steps between evaluations on the validation split, or `epoch`; 0 = only at the end."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations in a row without a better validation loss; 0 = never (3 with a threshold)."""
    early_stopping_threshold: float | None = None
    """How much lower a validation loss must be to count as better there (0.01 with a patience)."""
    load_best_model_at_end: bool = False
    """Write final.pt when the run is done: the weights with the lowest validation loss."""
    eval_batch_size: int | None = None
    """Windows of one evaluation micro-batch; batch_size where not given."""
    max_eval_samples: int = 640
    """Validation windows used at each evaluation, evenly spread; 0 = all."""
    generate_interval: Interval = 250
    """Steps between samples from the fixed prompts, or `epoch`; 0 = never."""
    sample_prompts: tuple[str, ...] = ("Hello, I'm a language model,",)
    """The fixed prompts."""
    sample_tokens: int = 64
    """New tokens of one sample."""
    checkpoint_interval: Interval = 1000
    """Steps between full checkpoints, or `epoch`; the last step is always saved. 0 = only the last."""
    keep_last_n_checkpoints: int = 3
    """Newest checkpoints to keep (best.pt is kept besides); 0 = all."""
    async_save: Literal["auto", "on", "off"] = "auto"
    """Write checkpoints beside the next steps, from a copy in host memory; auto: those of 64 MB and more."""
    auto_resume: bool = False
    """Go on from the newest good checkpoint in log_dir, if there is one."""
    resume: bool = False
    """Go on from --checkpoint_path (without it: from the newest good checkpoint in log_dir, which must exist)."""
    checkpoint_path: str | None = None
    """The checkpoint that --resume goes on from."""
    log_interval: int | None = None
    """Steps between lines of metrics.jsonl; every step in runs of at most 200 steps, else 10."""
    seed: int = 1337
    """Seed of weights, order of samples and dropout."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dist_timeout: float = 300.0
    """Several processes: seconds without a word from one of them after which the others name it and leave."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Autocast type; auto: bfloat16 or float16 on a GPU, float32 on a CPU (bfloat16 can be 24x slower there)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on on a GPU, off on a CPU (no gain measured there)."""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """torch.set_float32_matmul_precision: high allows TF32 on a GPU."""
    exact: bool = False
    """The same bits on 1, 2, 4 ... processes: a fixed order of sums, dropout seeded by micro-batch, no compilation."""
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """What the processes share out: the data; zero1: the optimizer's state too; fsdp: weights and gradients as well."""
    cpu_offload: bool = False
    """With --parallel fsdp: weights and optimizer state stay in host memory, blocks come to the GPU for their turn."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    plan: bool = False
    """Print what the run will take in memory and what would save how much, and stop: nothing is loaded."""
    wandb: bool = False
    """Log to Weights & Biases too (WANDB_MODE=offline needs no account)."""
    wandb_project: str = "espalier"
    """Project name there."""
    tensorboard: bool = False
    """Write event files for TensorBoard too, in LOG_DIR/tensorboard (pip install tensorboard)."""


@dataclass
class TrainSettings(RunSettings):
    """train_gpt2.py: the defaults are GPT-2 124M on 10B FineWeb-Edu tokens."""


@dataclass
class FinetuneSettings(RunSettings):
    """finetune_dolly.py: tuning on instruction data, of all parameters or of few."""

    pretrained_checkpoint: str = "logs/model_19072.pt"
    """Model to start from: a checkpoint (.pt), a Hugging Face folder, a GGUF file, or a Hub name (owner/name)."""
    data_dir: str = "dolly15k"
    """Folder of instruction shards made by prepare_data.py (a bare name: data/NAME), or a .jsonl/.json of records."""
    log_dir: str = "logs_finetune"
    """Folder of the run: model_NNNNN.pt, metrics.jsonl, config.yaml, training.log, curves.png."""
    finetune_method: Literal["full", "progressive", "freeze", "lora", "qlora", "adapter", "prefix", "p_tuning"] = "full"
    """What is trained: all parameters, at once or from the top down, the last layers, or a small addition."""
    objective: Literal["sft", "dpo", "grpo", "distill"] = "sft"
    """What is minimised: loss on given answers, on pairs of a better and a worse one, minus a reward of new ones, or
    distance from a teacher's predictions."""
    dpo_beta: float = 0.1
    """DPO: how much a change of log-probability against the reference counts; larger stays closer to it."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO: logistic loss of the margin (Rafailov et al. 2023), or squared distance to a fixed one (IPO)."""
    label_smoothing: float = 0.0
    """DPO, sigmoid: share of pairs whose preference is taken to be the wrong way round."""
    reward: str = "arithmetic"
    """GRPO: arithmetic, or path/to/file.py:function of (prompt, completion, reference), texts, that gives a number."""
    grpo_group: int = 8
    """GRPO: completions of each prompt, whose rewards are compared with each other."""
    grpo_epochs: int = 1
    """GRPO: optimizer updates from the completions of one step."""
    grpo_clip: float = 0.2
    """GRPO: the ratio of new to old probability counts within 1 - clip and 1 + clip only."""
    grpo_beta: float = 0.04
    """GRPO: weight of the KL divergence from the reference; 0 needs no reference."""
    grpo_max_new_tokens: int = 128
    """GRPO: longest completion."""
    grpo_temperature: float = 1.0
    """GRPO: temperature of completions."""
    teacher: str | None = None
    """Distillation: the model to learn from, of any kind that can be started from, with the same tokenizer."""
    distill_hard: float = 0.0
    """Distillation: share of the ordinary loss on the text's own tokens; the rest is divergence from the teacher."""
    distill_hidden: float = 0.0
    """Distillation: weight of the distance between both models' streams behind each block, which both have alike."""
    adapter: str | None = None
    """A trained adapter to go on with, on the base that --pretrained_checkpoint names."""
    lora_r: int = 8
    """LoRA: rank."""
    lora_alpha: float = 16.0
    """LoRA: the update is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """LoRA: dropout on the input of A."""
    lora_target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """LoRA: layers, such as q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj, c_attn, or all-linear."""
    use_rslora: bool = False
    """LoRA: scale by lora_alpha / sqrt(lora_r), which keeps large ranks learning."""
    use_dora: bool = False
    """LoRA: learn the length of each output row apart from its direction (DoRA)."""
    lora_init: Literal["default", "pissa"] = "default"
    """LoRA: start at nothing, or at the largest singular parts of the weight (PiSSA)."""
    lora_plus_ratio: float = 1.0
    """LoRA: learning rate of B over that of A (LoRA+ advises 16)."""
    lora_mask: bool = True
    """LoRA on a pruned base: on = what is pruned stays zero, merged too; off = it writes there, and never merges."""
    quantization: Literal["nf4", "int8"] = "nf4"
    """QLoRA: how the base is kept."""
    adapter_dim: int = 64
    """Adapter: width of the bottleneck."""
    adapter_dropout: float = 0.1
    """Adapter: dropout on the bottleneck."""
    adapter_placement: Literal["block", "houlsby"] = "block"
    """Adapter: after each block, or after attention and after the MLP within it."""
    prefix_length: int = 20
    """Prefix and P-tuning: how many keys and values, or virtual tokens, stand before the text."""
    prefix_hidden: int = 512
    """Prefix and P-tuning: width of the network that makes them; 0 = the prefix itself is trained."""
    prefix_takes_positions: bool = False
    """Prefix: the text begins at position prefix_length, as in PEFT (which a GPT-2's prefix must, to go there)."""
    p_tuning_encoder: Literal["mlp", "lstm", "none"] = "mlp"
    """P-tuning: the network that makes the virtual tokens."""
    train_layers: int = 2
    """Freeze: how many of the last layers train."""
    unfreeze_stages: int = 4
    """Progressive: equal shares of the run; in the n-th, the last n / unfreeze_stages of the layers train."""
    layer_lr_decay: float = 0.9
    """Progressive: learning rate of a layer over that of the layer above it."""
    prompt_template: str = "dolly"
    """Of records (a .jsonl or .json): as in prepare_data.py; model = that of the model which the run starts from."""
    format: str = "auto"
    """Of records: what they are; auto goes by the fields of the first, see prepare_data.py."""
    system: str | None = None
    """Of records: a system message for every conversation that has none of its own."""
    train_on: str = "all"
    """Of records: all or last, which answers of a conversation are learnt."""
    bad_records: str = "error"
    """Of records: error or skip, what happens to damaged ones."""
    max_lr: float = 6e-5
    """Peak learning rate."""
    max_steps: int = 6
    """Optimizer steps (6 are about one epoch of Dolly-15k)."""
    warmup_steps: int = 1
    """Steps of linear warm-up."""
    beta2: float = 0.999
    """AdamW's decay of the square."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    eval_interval: Interval = 2
    """Steps between evaluations on the validation split, or `epoch`; 0 = only at the end."""
    generate_interval: Interval = 2
    """Steps between samples from the fixed prompts, or `epoch`; 0 = never."""
    sample_prompts: tuple[str, ...] = (
        "What is the difference between a list and a tuple?",
        "Summarize what an exception is in one sentence.",
        "How do I read a file line by line?",
    )
    """The fixed prompts, put into the data set's prompt format."""
    checkpoint_interval: Interval = 2
    """Steps between full checkpoints, or `epoch`; the last step is always saved. 0 = only the last."""


_LORA_FLAGS: tuple[str, ...] = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    *("use_rslora", "use_dora", "lora_init", "lora_plus_ratio", "lora_mask"),
)
# The settings that belong to one method or a few; given beside another method they would do nothing.
METHOD_FLAGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "progressive": ("unfreeze_stages", "layer_lr_decay"),
    "freeze": ("train_layers",),
    "lora": _LORA_FLAGS,
    "qlora": (*_LORA_FLAGS, "quantization"),
    "adapter": ("adapter_dim", "adapter_dropout", "adapter_placement"),
    "prefix": ("prefix_length", "prefix_hidden", "prefix_takes_positions"),
    "p_tuning": ("prefix_length", "prefix_hidden", "p_tuning_encoder"),
}

# The same of the objectives.
OBJECTIVE_FLAGS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("dpo_beta", "dpo_loss", "label_smoothing"),
    "grpo": (
        "reward",
        "grpo_group",
        "grpo_epochs",
        "grpo_clip",
        "grpo_beta",
        "grpo_max_new_tokens",
        "grpo_temperature",
    ),
    "distill": ("teacher", "distill_hard", "distill_hidden"),
}

# What a method changes in finetune_dolly.py's defaults; anything set explicitly wins. Few parameters, which start at or
# near nothing, want a larger rate than a whole pretrained network.
METHOD_DEFAULTS: dict[str, dict[str, float]] = {
    "lora": {"max_lr": 2e-4},
    "qlora": {"max_lr": 2e-4},
    "adapter": {"max_lr": 1e-3},
    "prefix": {"max_lr": 1e-3},
    "p_tuning": {"max_lr": 1e-3},
}

# What an objective changes, after its method. Steps of 64 pairs or 16 prompts of 1,024 tokens, as in their papers.
OBJECTIVE_DEFAULTS: dict[str, dict[str, float]] = {
    "dpo": {"total_batch_size": 65536},
    "grpo": {"total_batch_size": 16384},
}
# They move a model that can answer already, and with rates of supervised training they undo what it can.
PREFERENCE_LR: dict[str, float] = {
    **dict.fromkeys(("full", "progressive", "freeze"), 3e-6),
    **dict.fromkeys(("lora", "qlora"), 1e-5),
    **dict.fromkeys(("adapter", "prefix", "p_tuning"), 5e-5),
}

# What a preset changes in train_gpt2.py's defaults; anything set explicitly wins. `tiny` is for two CPU cores.
PRESET_DEFAULTS: dict[str, dict[str, int | float]] = {
    "tiny": {
        "block_size": 256,
        "batch_size": 16,
        "total_batch_size": 4096,
        "max_steps": 1000,
        "max_lr": 1e-3,
        "warmup_steps": 50,
        "checkpoint_interval": 250,
        "max_eval_samples": 64,
    },
}
PRESET_DEFAULTS["llama-tiny"] = PRESET_DEFAULTS["tiny"]
