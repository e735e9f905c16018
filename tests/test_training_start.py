"""Where a run starts: own checkpoint, pretrained model, random weights, with a reason at each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from formats.checkpoint import save_checkpoint
from tests.full_checkpoints import full_payload
from training.run_folder import RunFolder
from training.run_settings import FinetuneSettings, RunSettings, TrainSettings
from training.settings import is_explicit, parse, to_dict
from training.start import Start, choose_start, with_checkpoint_settings, with_preset_defaults

WEIGHTS = ("model", "config", "step", "val_loss")


def weights_only(step: int = 19072) -> dict[str, Any]:
    return {key: value for key, value in full_payload(step).items() if key in WEIGHTS}


class Place:
    """A working folder with the default names in it, and what was said."""

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root / "logs_finetune")
        self.pretrained = root / "logs" / "model_19072.pt"
        self.said: list[str] = []

    def start(self, *argv: str, cls: type[RunSettings] = FinetuneSettings) -> Start:
        self.said.clear()
        return choose_start(parse(cls, argv), self.folder, self.said.append)

    @property
    def text(self) -> str:
        return "\n".join(self.said)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)  # the default path of the pretrained model is relative
    return Place(tmp_path)


# -- the order: own checkpoint, pretrained, random -------------------------------------------------------------------


def test_own_checkpoint_first(place: Place) -> None:
    save_checkpoint(place.folder.checkpoint_path(4), full_payload(4))
    save_checkpoint(place.pretrained, weights_only())
    for flag in ("--auto_resume", "--resume"):
        start = place.start(flag)
        assert start.path == place.folder.checkpoint_path(4) and start.resumes
        assert start.payload is not None and start.payload["step"] == 4


def test_fine_tuning_does_not_go_on_from_the_state_of_a_pretraining_nor_the_other_way_round(place: Place) -> None:
    path = place.folder.checkpoint_path(4)
    for cls, other, script in (
        (FinetuneSettings, TrainSettings, "train_gpt2.py"),
        (TrainSettings, FinetuneSettings, "finetune_dolly.py"),
    ):
        save_checkpoint(path, {**full_payload(4), "settings": to_dict(other())})
        for flags in (["--auto_resume"], ["--resume", "--checkpoint_path", str(path)]):
            with pytest.raises(ValueError, match=f"model_00004.pt: is of a run of {script}: go on with that"):
                place.start(*flags, cls=cls)
            assert place.start(*flags, cls=other).resumes


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--finetune_method", "lora"], "pretrained_checkpoint"),
        (["--objective", "dpo"], "pretrained_checkpoint"),
        (["--objective", "distill"], "teacher"),
        ([], None),  # a full run holds all that it needs
    ],
)
def test_what_a_run_needs_again_does_not_lie_where_it_would_be_moved_aside(
    place: Place, flags: list[str], name: str | None
) -> None:
    own = place.folder.path / "best.pt"
    save_checkpoint(own, weights_only())
    save_checkpoint(place.pretrained, weights_only())
    words = [*flags, f"--{name or 'pretrained_checkpoint'}", str(own)]
    if name is None:
        assert place.start(*words).path == own
    else:
        with pytest.raises(ValueError, match=rf"^--{name} .*best\.pt lies in --log_dir"):
            place.start(*words)


def test_without_a_resume_flag_the_pretrained_model_even_beside_an_own_checkpoint(place: Place) -> None:
    save_checkpoint(place.folder.checkpoint_path(4), full_payload(4))
    save_checkpoint(place.pretrained, weights_only())
    start = place.start()
    assert start.path == Path("logs/model_19072.pt") and not start.resumes


def test_a_damaged_own_checkpoint_is_passed_over_with_its_reason(place: Place) -> None:
    save_checkpoint(place.folder.checkpoint_path(2), full_payload(2))
    save_checkpoint(place.pretrained, weights_only())
    place.folder.checkpoint_path(4).write_bytes(b"rotten")
    assert place.start("--auto_resume").path == place.folder.checkpoint_path(2)
    assert "model_00004.pt: is cut short" in place.text
    place.folder.checkpoint_path(2).write_bytes(b"rotten")
    start = place.start("--auto_resume")
    assert start.path == Path("logs/model_19072.pt") and not start.resumes
    for reason in ("model_00004.pt: is cut", "model_00002.pt: is cut", "no usable checkpoint in", "starting anew"):
        assert reason in place.text


def test_random_weights_last_with_a_loud_warning_and_every_reason(place: Place) -> None:
    start = place.start("--auto_resume")
    assert start == Start()
    assert "--auto_resume: no usable checkpoint" in place.text
    assert "logs/model_19072.pt: no such checkpoint" in place.text
    assert "WARNING: no pretrained model: starting from RANDOM weights" in place.text
    assert any(set(line) == {"!"} for line in place.said), "a warning that nobody overlooks"


def test_a_damaged_default_model_is_named_before_random_weights(place: Place) -> None:
    save_checkpoint(place.pretrained, weights_only())
    place.pretrained.write_bytes(place.pretrained.read_bytes()[:-9])
    assert place.start() == Start()
    assert "Default --pretrained_checkpoint not used: logs/model_19072.pt: ends without a digest" in place.text
    assert "RANDOM" in place.text


def test_pretraining_starts_from_random_weights_without_a_warning(place: Place) -> None:
    save_checkpoint(place.pretrained, weights_only())
    assert place.start(cls=TrainSettings) == Start() and place.said == []
    assert place.start("--auto_resume", cls=TrainSettings) == Start()
    assert "starting anew" in place.text and "RANDOM" not in place.text


# -- what is named must be there -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut", "rotten", "folder"])
@pytest.mark.parametrize(
    "flags",
    [["--pretrained_checkpoint"], ["--resume", "--checkpoint_path"], ["--auto_resume", "--pretrained_checkpoint"]],
)
def test_a_named_file_that_is_not_good_is_an_error(place: Place, damage: str, flags: list[str]) -> None:
    save_checkpoint(place.pretrained, weights_only())  # what it would otherwise fall through to
    file = Path("mine.pt")
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        save_checkpoint(file, full_payload())
        data = file.read_bytes()
        file.write_bytes(data[:-100] if damage == "cut" else data[:900] + b"?" + data[901:])
    with pytest.raises((ValueError, OSError), match=r"mine\.pt"):
        place.start(*flags, str(file))


def test_the_default_path_named_explicitly_must_be_there(place: Place) -> None:
    with pytest.raises(FileNotFoundError, match=r"logs/model_19072\.pt: no such checkpoint"):
        place.start("--pretrained_checkpoint", "logs/model_19072.pt")


def test_resume_without_anything_to_resume_is_an_error(place: Place) -> None:
    save_checkpoint(place.pretrained, weights_only())
    with pytest.raises(ValueError, match=r"--resume: no usable checkpoint in .*--checkpoint_path"):
        place.start("--resume")


def test_checkpoint_path_without_resume_is_an_error(place: Place) -> None:
    save_checkpoint("mine.pt", full_payload())
    for more in ([], ["--auto_resume"]):
        with pytest.raises(ValueError, match="add --resume"):
            place.start("--checkpoint_path", "mine.pt", *more)


# -- kinds of files --------------------------------------------------------------------------------------------------


def test_a_full_checkpoint_named_goes_on_from_its_step(place: Place) -> None:
    save_checkpoint("mine.pt", full_payload(500))
    start = place.start("--resume", "--checkpoint_path", "mine.pt")
    assert start.resumes and start.payload is not None and start.payload["step"] == 500


def test_weights_only_files_start_at_step_0(place: Place) -> None:
    save_checkpoint("mine.pt", weights_only())
    start = place.start("--resume", "--checkpoint_path", "mine.pt")
    assert not start.resumes and start.path == Path("mine.pt")
    assert "weights only" in place.text and "step 0" in place.text
    start = place.start("--pretrained_checkpoint", "mine.pt")
    assert not start.resumes and start.path == Path("mine.pt") and place.said == []


def test_a_full_checkpoint_as_the_pretrained_model_gives_its_weights(place: Place) -> None:
    save_checkpoint("mine.pt", full_payload(7))
    start = place.start("--pretrained_checkpoint", "mine.pt")
    assert not start.resumes and start.payload is not None


def test_files_without_a_digest(place: Place) -> None:
    torch.save(weights_only(), "weights.pt")
    assert place.start("--pretrained_checkpoint", "weights.pt").payload is not None
    assert "carries no digest" in place.text
    torch.save(full_payload(), "full.pt")
    with pytest.raises(ValueError, match=r"full\.pt: carries no digest"):
        place.start("--resume", "--checkpoint_path", "full.pt")


# -- settings on resume ----------------------------------------------------------------------------------------------


def resumed(argv: list[str], cls: type[RunSettings] = FinetuneSettings, **saved: Any) -> tuple[RunSettings, list[str]]:
    said: list[str] = []
    old = {**to_dict(cls()), **saved}
    return with_checkpoint_settings(parse(cls, argv), old, said.append), said


def test_what_is_not_given_comes_from_the_checkpoint() -> None:
    settings, said = resumed(["--auto_resume"], max_lr=0.5, sample_prompts=["a", "b"], packing=False)
    assert (settings.max_lr, settings.sample_prompts, settings.packing) == (0.5, ("a", "b"), False)
    assert said == []
    assert settings.auto_resume and not is_explicit(settings, "max_lr") and is_explicit(settings, "auto_resume")


def test_what_is_given_wins_and_the_difference_is_printed() -> None:
    settings, said = resumed(["--max_lr", "1e-5", "--batch_size", "16"], max_lr=0.5, batch_size=16)
    assert settings.max_lr == 1e-5
    assert said == ["  max_lr: 0.5 in the checkpoint, now 1e-05"]
    settings, said = resumed(["--sample_prompts", "a", "b"], sample_prompts=["a", "b"])
    assert said == [], "a list in the file and a tuple here are the same"


def test_given_at_its_default_it_wins_too() -> None:
    settings, said = resumed(["--max_lr", "6e-5"], max_lr=0.5)
    assert settings.max_lr == 6e-5 and len(said) == 1


@pytest.mark.parametrize("name", ["log_dir", "auto_resume", "resume", "checkpoint_path", "device", "wandb"])
def test_some_settings_belong_to_this_start_alone(name: str) -> None:
    other: Any = True if isinstance(getattr(FinetuneSettings(), name), bool) else "elsewhere"
    settings, said = resumed([], **{name: other})
    assert getattr(settings, name) == getattr(FinetuneSettings(), name) and said == []


@pytest.mark.parametrize(
    ("argv", "saved", "expected"),
    [
        (["--max_steps", "9"], {"epochs": 2.0}, {"max_steps": 9, "epochs": None}),
        (["--epochs", "3"], {"max_steps": 9}, {"epochs": 3.0, "max_steps": 6}),
        (["--warmup_steps", "4"], {"warmup_ratio": 0.5}, {"warmup_steps": 4, "warmup_ratio": None}),
        (["--grad_accum_steps", "4"], {"total_batch_size": 77}, {"grad_accum_steps": 4, "total_batch_size": 524288}),
        (["--total_batch_size", "88"], {"grad_accum_steps": 3}, {"total_batch_size": 88, "grad_accum_steps": None}),
        ([], {"epochs": 2.0, "max_steps": 6}, {"epochs": 2.0}),
    ],
)
def test_a_setting_of_today_silences_its_partner_of_then(
    argv: list[str], saved: dict[str, Any], expected: dict[str, Any]
) -> None:
    settings, _ = resumed(argv, **saved)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_settings_of_other_versions_do_no_harm() -> None:
    settings, said = resumed([], invented_later=3)
    assert settings == FinetuneSettings() and said == []


# -- presets ---------------------------------------------------------------------------------------------------------


def test_the_tiny_preset_changes_defaults_but_nothing_explicit() -> None:
    settings = with_preset_defaults(parse(TrainSettings, ["--preset", "tiny", "--max_steps", "19073"]))
    assert (settings.block_size, settings.max_lr, settings.max_steps) == (256, 1e-3, 19073)
    assert is_explicit(settings, "max_steps") and not is_explicit(settings, "block_size")
    assert with_preset_defaults(parse(TrainSettings, [])) == TrainSettings()
    built = with_preset_defaults(TrainSettings(preset="tiny", max_lr=0.5))
    assert built.max_lr == 0.5 and built.block_size == 256


def test_fine_tuning_takes_nothing_from_a_preset() -> None:
    settings = parse(FinetuneSettings, ["--preset", "tiny"])
    assert with_preset_defaults(settings) == settings
