"""Settings: flags and YAML through one table, types, conflicts of names, and what a user's mistake looks like."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies

from training.aliases import ALIASES, CHOICES, IMPLIED, SECTIONS
from training.run_settings import FinetuneSettings, RunSettings, TrainSettings
from training.settings import field_names, is_explicit, is_flag, parse, to_dict, to_yaml

ROOT = Path(__file__).resolve().parent.parent

# A name that others script against: changing a line here breaks somebody's script or config.
GOLDEN_ALIASES = {
    "model_name_or_path": "pretrained_checkpoint",
    "base_model": "pretrained_checkpoint",
    "dataset_name": "data_dir",
    "output_dir": "log_dir",
    "num_train_epochs": "epochs",
    "max_train_samples": "max_samples",
    "learning_rate": "max_lr",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
    "lr_scheduler_type": "lr_schedule",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "logging_steps": "log_interval",
    "save_steps": "checkpoint_interval",
    "eval_steps": "eval_interval",
    "save_total_limit": "keep_last_n_checkpoints",
    "max_length": "block_size",
    "max_seq_length": "block_size",
    "target_modules": "lora_target_modules",
    "finetune_lr": "max_lr",
    "finetune_epochs": "epochs",
    "finetune_samples": "max_samples",
    "finetune_batch_size": "batch_size",
    "finetune_seq_len": "block_size",
    "finetune_grad_accum": "grad_accum_steps",
    "finetune_max_grad_norm": "max_grad_norm",
    "finetune_weight_decay": "weight_decay",
    "finetune_warmup_steps": "warmup_steps",
    "on_nonfinite": "nan_policy",
}

# Names whose values mean something else here: what each sets, None for what is so anyway. No other value will do.
GOLDEN_CHOICES = {
    ("fp16", "true"): ("dtype", "float16"),
    ("fp16", "false"): None,
    ("bf16", "true"): ("dtype", "bfloat16"),
    ("bf16", "false"): None,
    ("bias", "none"): None,
    ("task_type", "causal_lm"): None,
    ("metric_for_best_model", "eval_loss"): None,
    ("metric_for_best_model", "loss"): None,
    ("greater_is_better", "false"): None,
}
GOLDEN_SECTIONS = {
    "lora": {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    "training": {},
    "model": {},
    "data": {},
}
GOLDEN_IMPLIED = {"lora": {"finetune_method": "lora"}, "training": {"min_lr_ratio": "0"}}

# Words for settings that do not take a number.
SAMPLE_VALUES = {
    "epochs": "2",
    "lr_schedule": "linear",
    "pretrained_checkpoint": "m.pt",
    "data_dir": "d",
    "log_dir": "l",
    "lora_target_modules": "k_proj",
    "nan_policy": "skip",
}


def write(folder: Path, text: str) -> str:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


# -- the alias table ---------------------------------------------------------------------------------------------------


def test_alias_table_is_what_others_rely_on() -> None:
    assert ALIASES == GOLDEN_ALIASES
    assert SECTIONS == GOLDEN_SECTIONS and IMPLIED == GOLDEN_IMPLIED
    choices = {(name, word): choice.values[word] and (choice.setting, choice.values[word])
               for name, choice in CHOICES.items() for word in choice.values}  # fmt: skip
    assert choices == GOLDEN_CHOICES


def test_every_alias_means_a_setting_and_hides_none() -> None:
    names = set(field_names(FinetuneSettings))
    own_keys = {name for keys in SECTIONS.values() for name in keys.values()}
    implied = {name for values in IMPLIED.values() for name in values}
    assert {*ALIASES.values(), *own_keys, *implied, *(choice.setting for choice in CHOICES.values())} <= names
    assert not {*ALIASES, *CHOICES, *SECTIONS} & names


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_flag_and_yaml_key_of_an_alias_set_the_same(alias: str, tmp_path: Path) -> None:
    name = ALIASES[alias]
    word = SAMPLE_VALUES.get(name, "7")
    by_flag = parse(FinetuneSettings, [f"--{alias}", word])
    by_file = parse(FinetuneSettings, ["--config", write(tmp_path, f"{alias}: {word}\n")])
    assert by_flag == by_file == parse(FinetuneSettings, [f"--{name}", word])
    assert getattr(by_flag, name) != getattr(FinetuneSettings(), name), "the sample value is the default"
    assert is_explicit(by_flag, name) and is_explicit(by_file, name)


# -- the nested form ---------------------------------------------------------------------------------------------------

NESTED = """
base_model: Qwen/Qwen2.5-3B-Instruct
lora:
  r: 16
  lora_alpha: 32
  target_modules:
    - q_proj
    - down_proj
  lora_dropout: 0.1
  bias: "none"
  task_type: "CAUSAL_LM"
training:
  num_train_epochs: 5
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  learning_rate: 2.0e-4
  warmup_ratio: 0.1
  lr_scheduler_type: cosine
  fp16: true
  gradient_checkpointing: true
  logging_steps: 10
  save_steps: 100
  eval_steps: 50
  save_total_limit: 3
  load_best_model_at_end: true
  metric_for_best_model: "eval_loss"
  greater_is_better: false
"""
FLAT = {
    "pretrained_checkpoint": "Qwen/Qwen2.5-3B-Instruct",
    "finetune_method": "lora",
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_target_modules": ("q_proj", "down_proj"),
    "lora_dropout": 0.1,
    "epochs": 5.0,
    "batch_size": 4,
    "grad_accum_steps": 4,
    "max_lr": 2e-4,
    "min_lr_ratio": 0.0,
    "warmup_ratio": 0.1,
    "lr_schedule": "cosine",
    "dtype": "float16",
    "gradient_checkpointing": True,
    "log_interval": 10,
    "checkpoint_interval": 100,
    "eval_interval": 50,
    "keep_last_n_checkpoints": 3,
    "load_best_model_at_end": True,
}


def test_sections_say_what_flat_keys_say(tmp_path: Path) -> None:
    nested = parse(FinetuneSettings, ["--config", write(tmp_path, NESTED)])
    assert nested == FinetuneSettings(**FLAT)  # type: ignore[arg-type]
    assert nested.explicit_names == set(FLAT)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("lora: {r: 4}", [], {"finetune_method": "lora", "lora_r": 4, "min_lr_ratio": 0.1}),
        ("finetune_method: qlora\nlora: {r: 4}", [], {"finetune_method": "qlora", "lora_r": 4}),
        ("lora: {r: 4, finetune_method: qlora}", [], {"finetune_method": "qlora", "lora_r": 4}),
        ("lora: {r: 4}", ["--finetune_method", "qlora"], {"finetune_method": "qlora", "lora_r": 4}),
        ("lora: {}", [], {"finetune_method": "lora", "lora_r": 8}),
        ("lora: {lora_r: 4, use_dora: true}", ["--lora_r", "2"], {"lora_r": 2, "use_dora": True}),
        ("training: {max_lr: 1e-4, min_lr_ratio: 0.2}", [], {"max_lr": 1e-4, "min_lr_ratio": 0.2}),
        ("training: {lr_scheduler_type: linear}", ["--min_lr_ratio", "0.5"], {"min_lr_ratio": 0.5}),
        ("training: {fp16: false}", [], {"dtype": "auto", "min_lr_ratio": 0.0}),
        ("training: {fp16: false, bf16: yes}", [], {"dtype": "bfloat16"}),
        ("training: {fp16: true}", ["--dtype", "float32"], {"dtype": "float32"}),
        (
            "model: {base_model: m.pt}\ndata: {max_length: 256}",
            [],
            {"pretrained_checkpoint": "m.pt", "block_size": 256},
        ),
        ("max_lr: 1e-4", ["--fp16", "--metric_for_best_model", "eval_loss"], {"dtype": "float16", "max_lr": 1e-4}),
        ("max_lr: 1e-4", ["--no_fp16", "--bf16", "true", "--greater_is_better=False"], {"dtype": "bfloat16"}),
    ],
)
def test_what_sections_imply_and_what_beats_it(
    text: str, argv: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    parsed = parse(FinetuneSettings, ["--config", write(tmp_path, text + "\n"), *argv])
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora: {bias: all}", "bias all: LoRA trains no biases here"),
        ("lora: {task_type: SEQ_CLS}", "only CAUSAL_LM will do"),
        ("training: {greater_is_better: true}", "of two losses the lower is better"),
        ("training: {metric_for_best_model: accuracy}", "only eval_loss will do"),
        ("training: {fp16: maybe}", "fp16 maybe: expected true or false"),
        ("training: {fp16: true, bf16: true}", "'bf16' sets dtype a second time"),
        ("training: {fp16: true}\ndtype: float16", "'dtype' sets dtype a second time"),
        ("max_lr: 1\ntraining: {learning_rate: 1}", "'learning_rate' sets max_lr a second time"),
        ("lora: {rank: 4}", "unknown setting 'rank' in lora:"),
        ("training: {learning_rat: 4}", "unknown setting 'learning_rat' in training:. Did you mean learning_rate?"),
        ("lora: {lora_alpa: 4}", "Did you mean lora_alpha?"),
        ("r: 4", "unknown setting 'r'"),
        ("lora: 16", "lora: is a section"),
        ("lora: [q_proj]", "lora: is a section"),
        ("training:", "training: is a section"),
        ("training: {lora: {r: 4}}", "unknown setting 'lora' in training:"),
        ("loras: {r: 4}", "unknown setting 'loras'"),
        ("lora: {r: none}", "lora_r"),
    ],
)
def test_a_wrong_section_is_named_with_the_reason(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        parse(FinetuneSettings, ["--config", write(tmp_path, text + "\n")])
    assert says in str(caught.value) and "settings.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--fp16", "--bf16"], "--fp16 and --bf16 both set dtype"),
        (["--dtype", "float32", "--fp16"], "--dtype and --fp16 both set dtype"),
        (["--bias", "all"], "LoRA trains no biases here"),
        (["--metric_for_best_model"], "only eval_loss will do"),
    ],
)
def test_a_wrong_choice_by_flag(argv: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(FinetuneSettings, argv)


def test_names_about_fine_tuning_alone_are_unknown_to_pretraining(tmp_path: Path) -> None:
    assert parse(TrainSettings, ["--config", write(tmp_path, "training: {fp16: true}\n")]).dtype == "float16"
    for text in ("lora: {r: 4}", "bias: none"):
        with pytest.raises(ValueError, match="unknown setting"):
            parse(TrainSettings, ["--config", write(tmp_path, text + "\n")])


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_finetuning_defaults_of_the_documented_table() -> None:
    expected = {
        "pretrained_checkpoint": "logs/model_19072.pt",
        "data_dir": "dolly15k",
        "log_dir": "logs_finetune",
        "batch_size": 16,
        "max_lr": 6e-5,
        "warmup_steps": 1,
        "max_steps": 6,
        "checkpoint_interval": 2,
        "keep_last_n_checkpoints": 3,
        "eval_interval": 2,
        "generate_interval": 2,
        "weight_decay": 0.01,
        "block_size": 1024,
        "total_batch_size": 524288,
        "optimizer": "adamw",
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "lr_schedule": "cosine",
        "min_lr_ratio": 0.1,
        "epochs": None,
        "auto_resume": False,
        "resume": False,
        "checkpoint_path": None,
        "packing": True,
    }
    got = to_dict(parse(FinetuneSettings, []))
    assert {name: got[name] for name in expected} == expected


def test_pretraining_defaults_are_gpt2_on_ten_billion_tokens() -> None:
    expected = {
        "preset": "124M",
        "data_dir": "fineweb-edu",
        "log_dir": "logs",
        "block_size": 1024,
        "total_batch_size": 524288,
        "max_steps": 19073,
        "max_lr": 6e-4,
        "warmup_steps": 715,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "max_grad_norm": 1.0,
        "dropout": 0.0,
        "lr_schedule": "cosine",
    }
    got = to_dict(parse(TrainSettings, []))
    assert {name: got[name] for name in expected} == expected


@pytest.mark.parametrize("cls", [TrainSettings, FinetuneSettings])
def test_nothing_is_explicit_by_default(cls: type[RunSettings]) -> None:
    parsed, built = parse(cls, []), cls()
    assert parsed == built
    assert not [name for name in field_names(cls) if is_explicit(parsed, name) or is_explicit(built, name)]


def test_explicit_names_say_what_was_set_even_at_its_default(tmp_path: Path) -> None:
    file = write(tmp_path, "learning_rate: 6e-5\n")
    parsed = parse(FinetuneSettings, ["--config", file, "--max_steps", "6", "--no_packing"])
    assert parsed.explicit_names == {"max_lr", "max_steps", "packing"}  # type: ignore[attr-defined]
    assert is_explicit(parsed, "max_steps") and not is_explicit(parsed, "batch_size")
    assert is_flag(parsed, "max_steps") and not is_flag(parsed, "max_lr")


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "0.0001", ".0001", "1.e-4"])
def test_a_float_may_be_written_in_any_way(number: str, tmp_path: Path) -> None:
    assert parse(TrainSettings, ["--config", write(tmp_path, f"max_lr: {number}\n")]).max_lr == 1e-4
    assert parse(TrainSettings, ["--max_lr", number]).max_lr == 1e-4


@pytest.mark.parametrize(("text", "value"), [("1e8", 100_000_000), ("5.24288e5", 524288), ("1E+3", 1000), ("17", 17)])
def test_a_whole_number_may_be_written_with_an_exponent(text: str, value: int, tmp_path: Path) -> None:
    for settings_ in (
        parse(TrainSettings, ["--total_batch_size", text]),
        parse(TrainSettings, [f"--total_batch_size={text}"]),
        parse(TrainSettings, ["--config", write(tmp_path, f"total_batch_size: {text}\n")]),
    ):
        assert settings_.total_batch_size == value and isinstance(settings_.total_batch_size, int)
    assert parse(TrainSettings, ["--eval_interval", "1e3"]).eval_interval == 1000


@pytest.mark.parametrize("text", ["2.5", "6.0", "1e-1", "2.5e0", "1e999", "seven", "1e", "0x10"])
def test_what_is_no_whole_number_is_refused_by_flag_and_file(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        parse(TrainSettings, ["--max_steps", text])
    with pytest.raises(ValueError, match=r"settings\.yaml.*max_steps"):
        parse(TrainSettings, ["--config", write(tmp_path, f"max_steps: {text}\n")])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max_lr", "fast"], "--max_lr"),
        (["--dtype", "fp16"], "float16"),
        (["--eval_interval", "epochs"], "--eval_interval"),
        (["--epochs", "one"], "--epochs"),
        (["--packing", "perhaps"], "true or false"),
        (["--max_lr"], "--max_lr"),
        (["stray"], "stray"),
        (["--max_lr", "1", "2"], "2"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(argv: list[str], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(FinetuneSettings, argv)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--packing"], True),
        (["--no_packing"], False),
        (["--no-packing"], False),
        (["--packing", "false"], False),
        (["--packing=False"], False),
        (["--packing", "True"], True),
        (["--no_packing", "--packing"], True),
        (["--packing", "--no_packing"], False),
    ],
)
def test_switches(argv: list[str], value: bool) -> None:
    parsed = parse(FinetuneSettings, argv)
    assert parsed.packing is value and is_explicit(parsed, "packing")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("packing: false", "packing", False),
        ("packing: no", "packing", False),
        ("wandb: yes", "wandb", True),
        ("compile: on", "compile", "on"),  # a bool in YAML 1.1
        ("compile: off", "compile", "off"),
        ("log_dir: 1e-4", "log_dir", "1e-4"),  # a number in YAML, the name of a folder here
        ("log_dir: 2024-01-02", "log_dir", "2024-01-02"),
        ("log_dir: 007", "log_dir", "007"),
        ("log_dir: yes", "log_dir", "yes"),
        ("epochs: null", "epochs", None),
        ("epochs: ~", "epochs", None),
        ("checkpoint_interval: epoch", "checkpoint_interval", "epoch"),
        ("sample_prompts: one only", "sample_prompts", ("one only",)),
        ("sample_prompts: [a, 'b c', 1e-4]", "sample_prompts", ("a", "b c", "1e-4")),
        ("sample_prompts: []", "sample_prompts", ()),
        ("sample_prompts:\n  - ü\n  - -5 degrees", "sample_prompts", ("ü", "-5 degrees")),
        ("", "max_lr", 6e-4),
    ],
)
def test_yaml_values_mean_what_they_look_like(line: str, name: str, value: Any, tmp_path: Path) -> None:
    got = getattr(parse(TrainSettings, ["--config", write(tmp_path, line + "\n")]), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_lrr: 1\n", "Did you mean max_lr?"),
        ("1: 2\n", "'1'"),
        ("max_lr: 1\nlearning_rate: 2\n", "a second time"),
        ("max_lr: 1\nmax_lr: 2\n", "a second time"),
        ("- a\n- b\n", "name: value"),
        ("just words\n", "name: value"),
        ("max_lr: [1\n", "not valid YAML"),
        ("max_lr: [1, 2]\n", "2"),
        ("max_lr: {a: 1}\n", "max_lr"),
        ("data_dir: null\n", "data_dir"),
        ("data_dir:\n", "data_dir"),
        ("max_lr: !!python/object/apply:os.system ['true']\n", "max_lr"),
    ],
)
def test_a_wrong_file_is_named_with_the_reason(text: str, says: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        parse(FinetuneSettings, ["--config", file])
    assert file in str(caught.value) and says in str(caught.value) and "\n" not in str(caught.value)


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00max_lr")
    for path in (tmp_path / "missing.yaml", tmp_path, binary):
        with pytest.raises(ValueError, match=str(path)):
            parse(TrainSettings, ["--config", str(path)])
    with pytest.raises(ValueError, match="--config needs a file"):
        parse(TrainSettings, ["--config"])


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "near"), [("--max_lrr", "--max_lr"), ("--bach_size", "--batch_size"), ("--autoresume", "--auto_resume")]
)
def test_an_unknown_flag_is_refused_with_the_nearest_name(flag: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown flag {flag}. Did you mean {near}\\?"):
        parse(TrainSettings, [flag, "1"])


def test_abbreviations_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="unknown flag --max_st"):
        parse(TrainSettings, ["--max_st", "3"])


def test_a_flag_twice_the_last_wins_but_two_names_are_an_error(tmp_path: Path) -> None:
    assert parse(TrainSettings, ["--max_lr", "1", "--max-lr", "2", "--max_lr=3"]).max_lr == 3
    assert parse(TrainSettings, ["--sample_prompts", "a", "b", "--sample_prompts", "c"]).sample_prompts == ("c",)
    with pytest.raises(ValueError, match="--max_lr and --learning_rate both set max_lr"):
        parse(TrainSettings, ["--max_lr", "1", "--learning_rate", "1"])
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("max_lr: 1")
    second.write_text("max_lr: 2")
    assert parse(TrainSettings, ["--config", str(first), f"--config={second}"]).max_lr == 2


def test_flags_win_over_the_file_wherever_they_stand(tmp_path: Path) -> None:
    file = write(tmp_path, "learning_rate: 1e-3\nbatch_size: 4\npacking: false\nsample_prompts: [a, b]\n")
    for argv in (["--max_lr", "2", "--config", file, "--packing"], ["--packing", f"--config={file}", "--max_lr=2"]):
        parsed = parse(TrainSettings, [*argv, "--sample_prompts", "c"])
        assert (parsed.max_lr, parsed.batch_size, parsed.packing, parsed.sample_prompts) == (2, 4, True, ("c",))


# -- the resolved settings ---------------------------------------------------------------------------------------------


def printed_config(argv: list[str], capsys: pytest.CaptureFixture[str], cls: type = FinetuneSettings) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(cls, [*argv, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--max_lr", "1e-4", "--no_packing", "--eval_interval", "epoch", "--compile", "on"],
        ["--epochs", "0.5", "--warmup_ratio", "0.1", "--grad_accum_steps", "4"],
        ["--log_dir", "1e-4", "--data_dir", "on", "--checkpoint_path", "null", "--wandb_project", "~"],
        ["--sample_prompts", "two\nlines: # no comment", "'quoted' \"both\"", "答え", "", " "],
    ],
)
def test_print_config_goes_through_config(argv: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = printed_config(argv, capsys)
    again = parse(FinetuneSettings, ["--config", write(tmp_path, text)])
    assert again == parse(FinetuneSettings, argv)
    assert printed_config(["--config", write(tmp_path, text)], capsys) == text


def test_a_flag_beats_its_other_name_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: 100\nwarmup_ratio: 0.1\n")
    settings = parse(TrainSettings, ["--config", str(file), "--epochs", "0.5", "--warmup_steps", "3"])
    assert (settings.epochs, settings.warmup_steps, settings.warmup_ratio) == (0.5, 3, None)
    assert not is_explicit(settings, "max_steps") and not is_explicit(settings, "warmup_ratio")


def test_print_config_is_plain_yaml_of_every_setting_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(printed_config(["--epochs", "2"], capsys))
    assert set(values) == set(field_names(FinetuneSettings)) - {"max_steps"}, "epochs stands for max_steps"
    assert values["epochs"] == 2 and values["batch_size"] == 16


TEXT = strategies.text(strategies.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


@given(
    prompts=strategies.lists(TEXT.filter(lambda text: not text.startswith("-")), max_size=3),
    lr=strategies.floats(0, 1e3),
    steps=strategies.integers(1, 10**12),
    name=TEXT.filter(lambda text: text and not text.startswith("-")),
)
@settings(max_examples=30, deadline=None)
def test_any_settings_survive_the_file(
    prompts: list[str], lr: float, steps: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = TrainSettings(sample_prompts=tuple(prompts), max_lr=lr, max_steps=steps, log_dir=name)
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(to_yaml(made), encoding="utf-8")
    assert parse(TrainSettings, ["--config", str(file)]) == made


def test_every_setting_is_documented() -> None:
    """Each field is followed by its help: a text in the source, which --help shows."""
    help_text = subprocess.run(
        [sys.executable, "finetune_dolly.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    words = " ".join(line.strip(" │") for line in help_text.splitlines())
    for field in dataclasses.fields(FinetuneSettings):
        assert f"--{field.name}" in words, field.name
    source = (ROOT / "training/run_settings.py").read_text()
    lines = [line.strip() for line in source.splitlines()]
    names = set(field_names(FinetuneSettings))
    for number, line in enumerate(lines):
        if ":" in line and line.split(":")[0] in names and "=" in line:
            rest = lines[number + 1 :] if not line.endswith("(") else lines[lines.index(")", number) + 1 :]
            assert rest[0].startswith('"""'), f"{line} has no help"
