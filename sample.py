"""Let a checkpoint answer prompts, or several of them side by side.

    python sample.py --checkpoints logs_finetune/best.pt --prompt "What is a tuple?"
    python sample.py --checkpoints logs/model_00999.pt logs_finetune/best.pt --prompts prompts.txt --html compare.html
    python sample.py --checkpoints logs_finetune --every 5 --prompts prompts.txt --seeds 3 --html run.html
    python sample.py --checkpoints HuggingFaceTB/SmolLM2-135M-Instruct --chat
    python sample.py --checkpoints logs/best.pt logs_finetune/best.pt --serve
    echo "What is a tuple?" | python sample.py --checkpoints logs_finetune/best.pt --prompts -

All checkpoints get the same prompts, in the same format, with the same seed. Exit code 2 for bad input.
"""

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from evaluation.settings import SampleSettings
from training.settings import run_script

if TYPE_CHECKING:
    from evaluation.compare import Sampling


def main(settings: SampleSettings) -> None:
    """Answer prompts, or hold a conversation, here or in a browser."""
    if settings.serve:
        serve(settings)
    elif settings.chat:
        chat(settings)
    else:
        answer(settings)


def chat(settings: SampleSettings) -> None:
    """Talk with one checkpoint in the terminal."""
    from evaluation.chat import Chat, converse
    from formats.open_model import open_model
    from model.pack import for_generation
    from training.distributed import choose_device

    others = [name for name in ("prompt", "prompts", "json", "html") if getattr(settings, name)]
    if len(settings.checkpoints) != 1 or others:
        what = f"--{others[0]} does not go with it" if others else f"{len(settings.checkpoints)} were given"
        raise ValueError(f"--chat talks with one checkpoint and reads what you type: {what}")
    device = choose_device(settings.device)
    opened = open_model(settings.checkpoints[0], device, base_model=settings.base_model)
    for_generation(opened.model, settings.weights)
    conversation = Chat(opened, _sampling(settings), settings.prompt_template, settings.system)
    converse(conversation, _typed_lines(), _write)


def serve(settings: SampleSettings) -> None:
    """The chat page and the API, until Ctrl+C."""
    from serve.chat import open_talkers, serve_chat
    from training.distributed import choose_device

    others = [name for name in ("chat", "prompt", "prompts", "json", "html") if getattr(settings, name)]
    if others:
        raise ValueError(f"--serve answers what its page and the API ask: --{others[0]} does not go with it")
    talkers = open_talkers(
        settings.checkpoints,
        prompt_template=settings.prompt_template,
        device=choose_device(settings.device),
        base_model=settings.base_model,
        weights=settings.weights,
    )
    serve_chat(talkers, _sampling(settings), settings.system, settings.port, lambda line: print(line, flush=True))


def answer(settings: SampleSettings) -> None:
    """Generate, show, write the files that were asked for."""
    from evaluation.checkpoints import expand_checkpoints, ignore
    from evaluation.compare import compare, prompt_fields
    from evaluation.prompts import prompt_record, read_prompts
    from report.compare import compare_page
    from report.files import write_json
    from report.terminal import AnswerStream, render_comparison
    from training.distributed import choose_device

    prompts = [prompt_record(text) for text in settings.prompt if text.strip()]
    prompts += read_prompts(settings.prompts) if settings.prompts is not None else []
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    stream = AnswerStream([prompt_fields(record) for record in prompts], _write, width)
    checkpoints = expand_checkpoints(settings.checkpoints, settings.every)
    streams = len(checkpoints) == settings.batch_size == settings.seeds == 1
    comparison = compare(
        checkpoints,
        prompts,
        _sampling(settings),
        seeds=settings.seeds,
        prompt_template=settings.prompt_template,
        batch_size=settings.batch_size,
        device=choose_device(settings.device),
        base_model=settings.base_model,
        weights=settings.weights,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        on_text=stream.text if streams else ignore,
        on_answer=stream.answer if streams else ignore,
    )
    if not streams:
        print(render_comparison(comparison, width))
    if settings.json is not None:
        print(f"JSON: {write_json(settings.json, comparison)}")
    if settings.html is not None:
        print(f"Page: {compare_page(comparison, settings.html)}")


def _sampling(settings: SampleSettings) -> "Sampling":
    from evaluation.compare import Sampling

    return Sampling(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Sampling)})


def _typed_lines() -> Iterator[str]:
    """Lines of the terminal with a prompt before each; of a file or pipe without."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_script(main, SampleSettings, "Let a checkpoint answer prompts, or several of them side by side.")
