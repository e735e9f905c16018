"""The study behind a search: Optuna's, in a SQLite file, checked to be the search that the file of ranges describes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.search_settings import SearchSettings, Space

if TYPE_CHECKING:
    from optuna import Study

LOCK_TIMEOUT_S = 30.0  # how long SQLite waits for another program before it calls the database locked


def open_study(settings: SearchSettings, space: Space, folder: Path, url: str) -> Study:
    """The study, new or found. Raises ValueError where it is another search than the file describes."""
    optuna = optuna_library()
    path = url.removeprefix("sqlite:///")
    if path == url or not path:
        raise ValueError(f"--storage {url}: expected sqlite:///FILE")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}})
    pruner = optuna.pruners.MedianPruner(settings.startup_trials) if settings.prune else optuna.pruners.NopPruner()
    study = optuna.create_study(storage=storage, study_name=settings.study, load_if_exists=True, pruner=pruner)
    plain, mark = json.loads(json.dumps(space.plain())), folder / ".study"
    if "space" not in study.user_attrs:
        if mark.exists() or any(folder.glob("trial-*")):
            raise ValueError(
                f"log_dir {folder} holds the trials of another search: set another log_dir in {settings.config}, "
                "or remove that folder"
            )
        mark.write_text(os.urandom(8).hex())
        study.set_user_attr("id", mark.read_text())
        study.set_user_attr("space", plain)
    _refuse_another(study, plain, settings)
    if not mark.exists() or mark.read_text() != study.user_attrs["id"]:
        raise ValueError(
            f"--study {settings.study}: its trials are not those in log_dir {folder}: give its own log_dir"
        )
    return study


def _refuse_another(study: Study, plain: dict[str, Any], settings: SearchSettings) -> None:
    """Raises ValueError naming the first difference between a study and the file's search."""
    for part, now in plain.items():
        before = study.user_attrs["space"][part]
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                was, is_now = (json.dumps(each[name]) if name in each else "nothing" for each in (before, now))
                raise ValueError(
                    f"--study {settings.study}: is another search: {name} was {was} there, is {is_now} in "
                    f"{settings.config}: name another --study and log_dir, or give the file back what it said"
                )


def optuna_library() -> Any:
    """The library, imported only here. Raises ValueError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ValueError("a search needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turns what SQLite refuses into one line."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        text = " ".join(str(getattr(cause, "orig", None) or cause).split())
        remedy = "another program holds it: end that, and the same command goes on"
        if "locked" not in text:
            remedy = "it must be a file that can be written, and a search's or a new one"
        raise ValueError(f"--storage {url}: {text}: {remedy}") from None
