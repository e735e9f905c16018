"""Let a checkpoint answer prompts, or several of them side by side.

    python sample.py --checkpoints logs_finetune/best.pt --prompt "What is a tuple?"
    python sample.py --checkpoints logs/model_00999.pt logs_finetune/best.pt --prompts prompts.txt --html compare.html
    echo "What is a tuple?" | python sample.py --checkpoints logs_finetune/best.pt --prompts -

All checkpoints get the same prompts, in the same format, with the same seed. Exit code 2 for bad input.
"""

import dataclasses
import shutil
import sys

from evaluation.settings import SampleSettings
from training.settings import run_script


def main(settings: SampleSettings) -> None:
    """Generate, show, write the files that were asked for."""
    from evaluation.checkpoints import ignore
    from evaluation.compare import Sampling, compare, prompt_fields
    from evaluation.prompts import prompt_record, read_prompts
    from report.compare import compare_page
    from report.files import write_json
    from report.terminal import AnswerStream, render_comparison
    from training.distributed import choose_device

    prompts = [prompt_record(text) for text in settings.prompt if text.strip()]
    prompts += read_prompts(settings.prompts) if settings.prompts is not None else []
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    stream = AnswerStream([prompt_fields(record) for record in prompts], _write, width)
    streams = len(settings.checkpoints) == 1 and settings.batch_size == 1
    comparison = compare(
        settings.checkpoints,
        prompts,
        Sampling(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Sampling)}),
        prompt_template=settings.prompt_template,
        batch_size=settings.batch_size,
        device=choose_device(settings.device),
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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_script(main, SampleSettings, "Let a checkpoint answer prompts, or several of them side by side.")
