"""Every error that Conch raises on purpose, in one tree.

    ConchError
    ├── ConfigError             a setting is wrong, unknown, or contradicts another
    ├── DataError               prompts, walks or pairs that cannot be trained on
    ├── ModelError              a model or tokenizer is missing, unreadable or unfit
    ├── RewardError             a reward could not be had
    │   ├── RewardUnavailableError   the infrastructure failed: server away, deadline passed
    │   └── RewardInvalidError       the reply or the user's function failed: wrong count, NaN, exception
    ├── ServingError            a model repository or a server
    │   ├── ModelStoreError         a folder of the model store is missing, damaged or not writable
    │   └── ServerStartError        tritonserver did not start or did not become ready
    ├── ConversionError         a checkpoint cannot be converted
    │   └── ParityError             the converted model does not score like the original
    ├── RolloutError            completions could not be sampled: memory, or a server that goes astray
    │   └── RolloutUnavailableError  a server that samples is away, or does not answer in time
    ├── ReferenceServerError    log-probs of the starting policy could not be had from its servers
    │   └── ReferenceUnavailableError  a server that holds it is away, or does not answer in time
    ├── ServiceError            a training service refuses a request, or gives no answer that can be read
    │   └── ServiceUnavailableError  the service is away, busy, or does not answer in time
    ├── CheckpointError         a checkpoint cannot be written or read
    ├── DistributedError        the ranks that run are not the ranks that were asked for, or one hangs
    └── StuckError              nothing of a run has moved within its deadline

A message says what is wrong, where, and what to do about it. Command-line programs print it without a
traceback and leave with code 1 (see `conch.cli.run_main`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path


class ConchError(Exception):
    """Base class: catch it to catch everything that Conch raises on purpose."""


class ConfigError(ConchError):
    """A setting is wrong, unknown, or contradicts another."""


class DataError(ConchError):
    """Prompts, samples or pairs that cannot be trained on."""


class ModelError(ConchError):
    """A model or tokenizer is missing, unreadable or unfit for the job."""


class RewardError(ConchError):
    """A reward could not be had."""


class RewardUnavailableError(RewardError):
    """The reward's infrastructure failed: the server is away or the deadline passed. Asking again may
    help."""


class RewardInvalidError(RewardError):
    """A reply or a reward function failed validation. Asking again gives the same answer."""


class ServingError(ConchError):
    """A model repository or a server is not as it must be."""


class ModelStoreError(ServingError):
    """A folder of the model store is missing, damaged or not writable."""


class ServerStartError(ServingError):
    """tritonserver could not be started or did not become ready in time."""


class ConversionError(ConchError):
    """A checkpoint cannot be converted into a served model."""


class ParityError(ConversionError):
    """A converted model does not score like the original; nothing was published."""


class RolloutError(ConchError):
    """Completions could not be sampled: no memory for the engine, or no server that answers as it must."""


class RolloutUnavailableError(RolloutError):
    """A server that samples is away or its deadline passed. Another one, or asking again, may help."""


class ReferenceServerError(ConchError):
    """A server of the starting policy refuses, or holds another model."""


class ReferenceUnavailableError(ReferenceServerError):
    """A server of the starting policy is away or its deadline passed. Another one, or a later try, helps."""


class ServiceError(ConchError):
    """A training service refuses a request, or gives no answer that can be read."""


class ServiceUnavailableError(ServiceError):
    """A training service is away, busy, or does not answer in time. Asking again may help."""


class CheckpointError(ConchError):
    """A checkpoint cannot be written or read."""


class DistributedError(ConchError):
    """The processes that run are not the processes that were asked for, or one of them hangs."""


class StuckError(ConchError):
    """Nothing of an asynchronous run has moved within its deadline: something waits for ever."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text, or of a text; the error's type where it has none."""
    text = str(error).strip()
    if not text and isinstance(error, BaseException):
        return type(error).__name__
    return text.partition("\n")[0].rstrip()


def yaml_problem(error: Exception) -> str:
    """Return on one line what is wrong in a YAML text, and where; PyYAML takes five lines for it.

    error: a `yaml.YAMLError`, or what reading the file raised.
    """
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split()) or type(error).__name__
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def install_extra(extra: str) -> str:
    """Return the command that installs what an extra of Conch needs, to be put behind "needs the package".

    No index has a `conch` of ours: the command names the checkout, or the packages where there is none.

    extra: as in pyproject.toml.
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    packages = requirements_of(extra)
    if not packages:
        return f"pip install -e '.[{extra}]' in a checkout of Conch"
    return "pip install " + " ".join(f"'{each}'" for each in packages)


def requirements_of(extra: str) -> list[str]:
    """Return what an extra of Conch requires by its metadata: `numpy<2`; [] where Conch is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        listed = [each.partition(";") for each in requires("conch") or ()]
    except PackageNotFoundError:
        return []
    of_extra = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    return [name.strip() for name, _, marker in listed if of_extra.search(marker)]


def missing_path(path: Path) -> str:
    """Return what to say behind "there is no such file": a near name, or where the path ceases to exist."""
    missing, parent = path, path.parent
    while not parent.exists():
        missing, parent = parent, parent.parent
    if not parent.is_dir():
        return f"; {parent} is a file"
    names = sorted(entry.name for entry in parent.iterdir())
    if near := difflib.get_close_matches(missing.name, names, n=1):
        return f"; did you mean {Path(parent, near[0], path.relative_to(missing))}?"
    below = "" if path.is_absolute() else f" in {Path.cwd()}"
    return f" ({missing} does not exist{below})"
