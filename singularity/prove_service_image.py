"""Takes the steps of the Dockerfiles of service and task in a folder, and shows that they serve. No Docker.

    sudo .venv/bin/python singularity/prove_service_image.py FOLDER [--pip FOLDER]

The folder becomes Debian 12 by debootstrap, in place of the image that FROM names; then RUN, COPY and ENV
are done as they stand, in a chroot. The entry point runs as the image's user, as process 1 of a process
namespace of its own, with the image's variables and those of docs/remote_service.md. It must refuse to start
without a key and with an unknown variable; be unhealthy before it listens and healthy then; train with a
client of this checkout from /models; go on with its runs behind SIGTERM, which it leaves with code 0, and
behind a SIGKILL of the server below process 1. Then the task of examples/remote, from its own image's files,
trains with it to the end.

FOLDER keeps what was made (2 GB with CPU builds of torch), so that a second call is quick; --anew makes the
image's steps again. Needs root and util-linux's unshare.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from conch.errors import ConchError
from conch.service.client import TrainingClient, TrainingSettings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = {
    "service": ROOT / "singularity" / "Dockerfile",
    "task": ROOT / "examples" / "remote" / "task" / "Dockerfile",
}
_STEPS = 2
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_START_S, _STOP_S = 180.0, 120.0


@dataclass
class Image:
    """What the steps of a stage give, but for its files.

    build: variables of RUN alone (ARG). user: uid, as text.
    steps: COPY and RUN, in their order, each behind the variables that hold there.
    """

    build: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    steps: list[tuple[dict[str, str], str, str]] = field(default_factory=list)


def read_stage(dockerfile: str, stage: str, build: Mapping[str, str] | None = None) -> Image:
    """The steps of one stage.

    build: values of ARG.

    Raises:
        ValueError: a step is none that is known here.
    """
    image, inside = Image(), False
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            inside = rest.split()[-1] == stage
        elif inside and word:
            _take(image, word, rest.strip(), build or {})
    return image


def _take(image: Image, word: str, rest: str, build: Mapping[str, str]) -> None:
    if word == "ARG":
        name, _, value = rest.partition("=")
        image.build[name] = build.get(name, value)
    elif word == "ENV":
        pairs = [pair.partition("=") for pair in shlex.split(rest)]
        path = image.environment["PATH"]
        image.environment |= {name: value.replace("$PATH", path) for name, _, value in pairs}
    elif word in ("COPY", "RUN"):
        image.steps.append(({**image.environment, **image.build}, word, rest))
    elif word == "USER":
        image.user = rest
    elif word == "ENTRYPOINT":
        image.entrypoint = json.loads(rest)
    elif word == "HEALTHCHECK":
        image.healthcheck = json.loads(rest.partition("CMD ")[2])
    elif word not in ("VOLUME", "EXPOSE"):
        raise ValueError(f"the step {word} is not known here")


# ----------------------------------------------------------------------------------------- the image's files


def inside(root: Path, command: Sequence[str], environment: Mapping[str, str], user: str = "0") -> list[str]:
    """A command that runs another in the folder, as process 1 of a process namespace of its own."""
    mounts = (
        'set -e; root=$1; user=$2; shift 2; mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"; '
        '[ ! -d "$root/../models" ] || mount --bind -o ro "$root/../models" "$root/models"; '
        '[ ! -d "$root/../pip" ] || mount --bind -o ro "$root/../pip" "$root/mnt"; '
        'exec chroot --userspec="$user:$user" "$root" /usr/bin/env -i "$@"'
    )
    variables = [f"{name}={value}" for name, value in environment.items()]
    own = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return [*own, "sh", "-c", mounts, "sh", str(root), user, *variables, *command]


def make(work: Path, name: str, image: Image, debootstrap: str) -> None:
    """Debian, and the steps on it."""
    base, root = work / "base", work / name
    if not (base / "etc/debian_version").exists():
        say(f"Debian 12 in {base}")
        options = ["--variant=minbase", "--include=ca-certificates", "bookworm", str(base)]
        subprocess.run([*shlex.split(debootstrap), *options, "http://deb.debian.org/debian"], check=True)
    if root.exists():
        shutil.rmtree(root)
    subprocess.run(["cp", "--archive", base, root], check=True)
    (root / "models").mkdir()
    for name in ("resolv.conf", "hosts"):
        shutil.copyfile(f"/etc/{name}", root / "etc" / name)
    mirror = {"PIP_CONFIG_FILE": "/mnt/pip.conf"} if (work / "pip").is_dir() else {}
    for environment, word, rest in image.steps:
        say(f"{word} {rest}")
        if word == "RUN":
            subprocess.run(inside(root, ["/bin/sh", "-c", rest], {**environment, **mirror}), check=True)
            continue
        *sources, target = rest.split()
        for source in sources:
            _copy(ROOT / source, root / target.removeprefix("/"), into=target.endswith("/"))
    (work / f".{name}").touch()


def _copy(source: Path, target: Path, *, into: bool) -> None:
    """As COPY does: the content of a folder, links as they are."""
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignored)
        return
    target = target / source.name if into else target
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


# --------------------------------------------------------------------------------------------- its container


@dataclass
class Container:
    """The entry point while it runs. outside: what started it, here."""

    outside: subprocess.Popen[str]
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Of its namespace, process 1 first."""
        return psutil.Process(self.outside.pid).children(recursive=True)

    def stop(self) -> int:
        """SIGTERM for process 1, as `docker stop` sends it; returns its exit code."""
        self.processes()[0].terminate()
        return self.outside.wait(_STOP_S)


class Proof:
    """All that must hold. images: by their names. port: of the service."""

    def __init__(self, work: Path, images: Mapping[str, Image], port: int) -> None:
        self._work, self._root, self._images = work, work / "service", images
        self._image = image = images["service"]
        self._key = secrets.token_hex(32)
        self._url = f"http://127.0.0.1:{port}"
        told = {"CONCH_SERVICE_KEY": self._key, "CONCH_SERVICE_MODELS": '["/models/start"]'}
        # As `-e` of `docker run`; all containers share this machine's ports here.
        self._environment = {**image.environment, **told, "CONCH_SERVICE_PORT": str(port)}

    def run(self) -> None:
        """One after the other."""
        self._refuses_in_words()
        with self._container() as container:
            self._wait_until_healthy(container)
            with TrainingClient(self._url, self._key, retry_s=_START_S) as client:
                run_id = self._train(client, 3)
                say("kill -9 of the server below process 1")
                container.processes()[-1].kill()
                check(client.get_status().run_id == run_id, "the run is gone behind SIGKILL")
            code = container.stop()
            check(code == 0, f"it left with code {code} behind SIGTERM: {container.log}")
        with self._container() as container:
            self._wait_until_healthy(container)
            with TrainingClient(self._url, self._key, retry_s=_START_S) as client:
                known = [each.run_id for each in client.get_runs()]
            check(run_id in known, "the volume lost the run")
            self._run_task()
            check(container.stop() == 0, "it did not leave with code 0")

    def _run_task(self) -> None:
        task = self._images["task"]
        told = {"SERVICE_URL": self._url, "CONCH_SERVICE_KEY": self._key, "MODEL": "/models/start"}
        environment = {**task.environment, **told, "STEPS": str(_STEPS)}
        words = inside(self._work / "task", task.entrypoint, environment, task.user)
        done = subprocess.run(words, capture_output=True, text=True, timeout=_START_S, check=False)
        check(done.returncode == 0 and f"version {_STEPS}" in done.stdout, f"the task failed: {done.stderr}")
        say(f"the task's container: {done.stdout.strip()}")

    def _refuses_in_words(self) -> None:
        for changes, words in (
            ({"CONCH_SERVICE_KEY": ""}, "environment variable CONCH_SERVICE_KEY"),
            ({"CONCH_SERVICE_MODLES": "x"}, "environment variable CONCH_SERVICE_MODLES is no setting"),
        ):
            done = self._call(self._image.entrypoint, {**self._environment, **changes})
            check(done.returncode == 1 and words in done.stderr, f"not refused: {done.stderr}")
            say(f"refused: {done.stderr.strip()[:90]} ...")
        check(not self._is_healthy(), "healthy before it listens")

    @contextmanager
    def _container(self) -> Iterator[Container]:
        log = self._work / "service.log"
        say("entry point: " + " ".join(self._image.entrypoint))
        with log.open("a") as output:
            command = inside(self._root, self._image.entrypoint, self._environment, self._image.user)
            outside = subprocess.Popen(command, stdout=output, stderr=output, text=True)
        try:
            yield Container(outside, log)
        finally:
            # --kill-child does not reach a child that has become another user.
            for process in psutil.Process(outside.pid).children() if outside.poll() is None else []:
                process.kill()
            outside.kill()
            outside.wait(_STOP_S)

    def _wait_until_healthy(self, container: Container) -> None:
        until = time.monotonic() + _START_S
        while not self._is_healthy():
            over = container.outside.poll() is not None or time.monotonic() > until
            check(not over, f"it does not become healthy: {container.log.read_text()[-2000:]}")
            time.sleep(1.0)
        say("healthy: " + " ".join(self._image.healthcheck))

    def _is_healthy(self) -> bool:
        return self._call(self._image.healthcheck, self._environment).returncode == 0

    def _call(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        words = inside(self._root, command, environment, self._image.user)
        return subprocess.run(words, capture_output=True, text=True, timeout=_START_S, check=False)

    def _train(self, client: TrainingClient, steps: int) -> str:
        settings = TrainingSettings(model_id="/models/start", max_completion_length=5, max_steps=steps)
        status = client.train(reward=_lengths, prompts=["a", "bc"], settings=settings)
        version = client.get_model(self._work / "model.zip")
        check(status.state == "finished" and version == steps, f"not trained: {status}")
        say(f"a client trained {steps} updates and downloaded the model")
        return status.run_id


def _lengths(outputs: Sequence[str], **_: Any) -> list[float]:
    return [float(len(output)) for output in outputs]


def say(text: str) -> None:
    """One step."""
    print(f"== {text}", flush=True)


def check(holds: bool, otherwise: str) -> None:
    """End here unless that holds.

    Raises:
        ConchError: it does not.
    """
    if not holds:
        raise ConchError(otherwise)


def main() -> int:
    """Exit code 0 once all is shown, 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="for what is made")
    add("--pip", type=Path, help="folder with a pip.conf that decides where packages come from, at /mnt")
    add("--torch-index", default="", help="build argument TORCH_INDEX")
    add("--debootstrap", default="debootstrap", help="command; default: %(default)s")
    add("--port", type=int, default=8000, help="of the service; default: %(default)s")
    add("--anew", action="store_true", help="take the image's steps again")
    options = parser.parse_args()
    work = options.folder.resolve()
    work.mkdir(parents=True, exist_ok=True)
    build = {"TORCH_INDEX": options.torch_index}
    images = {
        name: read_stage(file.read_text(encoding="utf-8"), name, build) for name, file in DOCKERFILES.items()
    }
    try:
        check(os.getuid() == 0, "run this as root: it makes a chroot")
        if options.pip is not None:
            check((options.pip / "pip.conf").is_file(), "--pip needs a folder that holds pip.conf")
            shutil.copytree(options.pip, work / "pip", dirs_exist_ok=True)
        for name, image in images.items():
            if options.anew or not (work / f".{name}").exists():
                make(work, name, image, options.debootstrap)
        _make_model(work / "models" / "start")
        Proof(work, images, options.port).run()
    except (ConchError, subprocess.SubprocessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say("proved: the images' steps are taken, and their entry points serve, train, and go on")
    return 0


def _make_model(folder: Path) -> None:
    if not folder.exists():
        code = "import sys; from pathlib import Path; from examples.remote.alphabetical import make_start; "
        code += "make_start(Path(sys.argv[1]), steps=3)"
        subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True)
    for file in folder.iterdir():  # safetensors makes its files for their owner alone
        file.chmod(0o644)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
