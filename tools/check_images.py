#!/usr/bin/env python3
"""Runs the install steps, entry point and health check of our images, without Docker.

The steps are read from the Dockerfile itself: the build stage's COPY and RUN happen under a
temporary folder that stands for the image's root, then the last stage's ENTRYPOINT and HEALTHCHECK
run with its ENV. What this cannot show: the base image and the last stage's own RUN, which sets up
a user.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dockerfile

ROOT = Path(__file__).resolve().parent.parent
INSTALL_TIMEOUT_SECONDS = 1800
HEALTHY_TIMEOUT_SECONDS = 120
STOP_TIMEOUT_SECONDS = 45
_COMMAND_TIMEOUT_SECONDS = 60

# Paths of the image that are moved under the temporary folder.
_IMAGE_PATH = re.compile(r"(?<![\w./])/(?=(?:opt|src|models)\b)")


class CheckError(Exception):
    """A step did not do what it should."""


class Image:
    """An image of a Dockerfile, as files under ``root``."""

    def __init__(self, path: Path, root: Path, build_args: Mapping[str, str]) -> None:
        self._stages = dockerfile.parse(path.read_text(encoding="utf-8"))
        self._root = root
        self._build_args = build_args

    def build(self, site_packages: Path | None) -> None:
        """Do what the build stage says.

        With ``site_packages``, its new environment sees the packages there, so that pip installs
        only what is missing.
        """
        stage = next(stage for stage in self._stages if stage.name == "build")
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        folder = self._root
        for step in stage.instructions:
            if step.name == "ARG":
                environment |= {k: self._build_args.get(k, v) for k, v in step.assignments.items()}
            elif step.name == "ENV":
                environment |= self._environment(step, environment)
            elif step.name == "WORKDIR":
                folder = Path(self._moved(step.value))
                folder.mkdir(parents=True)
            elif step.name == "COPY":
                self._copy(step.value.split(), folder)
            elif step.name == "RUN":
                print(f"RUN {step.value}", flush=True)
                command = ["/bin/sh", "-c", self._moved(step.value)]
                _run(command, environment, folder, INSTALL_TIMEOUT_SECONDS)
                _share_packages(Path(environment["VENV"]), site_packages)

    @contextmanager
    def run(self, overrides: Mapping[str, str]) -> Iterator[RunningImage]:
        """Run the entry point; leaving the context stops it as Docker would."""
        stage = self._stages[-1]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self._root)}
        for step in stage.instructions:
            if step.name == "ENV":
                environment |= self._environment(step, environment)
        environment |= {"HOSTNAME": socket.gethostname(), **overrides}
        entrypoint, command, health = map(stage.last, ("ENTRYPOINT", "CMD", "HEALTHCHECK"))
        if entrypoint is None or health is None:
            raise CheckError("the last stage has no ENTRYPOINT or no HEALTHCHECK")
        arguments = [*entrypoint.command, *(command.command if command else [])]
        print(f"ENTRYPOINT {' '.join(arguments)}", flush=True)
        with subprocess.Popen(_found(arguments, environment), env=environment) as process:
            running = RunningImage(process, environment, dockerfile.healthcheck_command(health))
            try:
                yield running
                running.stop()
            finally:
                process.kill()

    def _environment(
        self, step: dockerfile.Instruction, environment: Mapping[str, str]
    ) -> dict[str, str]:
        """The variables of an ENV, with variables inside them replaced."""
        return {
            name: re.sub(r"\$\{?(\w+)\}?", lambda m: environment.get(m[1], ""), self._moved(value))
            for name, value in step.assignments.items()
        }

    def _copy(self, paths: list[str], folder: Path) -> None:
        *sources, target = paths
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, folder / target)

    def _moved(self, text: str) -> str:
        return _IMAGE_PATH.sub(f"{self._root}/", text)


class RunningImage:
    """A process of an image's entry point."""

    def __init__(
        self, process: subprocess.Popen[bytes], environment: Mapping[str, str], health: list[str]
    ) -> None:
        self._process = process
        self._environment = environment
        self._health = health

    def is_healthy(self) -> bool:
        """Run the health check once."""
        return self.execute(self._health).returncode == 0

    def execute(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in the image's environment, as ``docker exec`` would."""
        return subprocess.run(
            _found(command, self._environment),
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_SECONDS,
            check=False,
        )

    def wait_healthy(self) -> None:
        """Wait until the health check passes."""
        deadline = time.monotonic() + HEALTHY_TIMEOUT_SECONDS
        while not self.is_healthy():
            if self._process.poll() is not None:
                raise CheckError(f"the entry point ended with {self._process.returncode}")
            if time.monotonic() > deadline:
                raise CheckError(f"not healthy within {HEALTHY_TIMEOUT_SECONDS} s")
            time.sleep(0.2)

    def stop(self) -> None:
        """SIGTERM; the exit code must be 0."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(STOP_TIMEOUT_SECONDS)
        if code != 0:
            raise CheckError(f"exit code {code} after SIGTERM")


def check_scheduler(image: Image) -> None:
    """Unhealthy alone, healthy with a worker, and without torch."""
    address = f"127.0.0.1:{_free_port()}"
    listen = {"APTSERVE_SCHEDULER_LISTEN": address, "APTSERVE_ADDRESS": address}
    with image.run({**listen, "APTSERVE_SCHEDULER_JOIN_TOKEN": "token"}) as scheduler:
        _wait_listening(address)
        if scheduler.is_healthy():
            raise CheckError("healthy without a worker")
        with _service("aptserve_worker", _worker_environment(address, model="fake")):
            scheduler.wait_healthy()
        if scheduler.execute(["python", "-c", "import torch"]).returncode == 0:
            raise CheckError("torch is installed in the scheduler's image")


def check_worker(image: Image) -> None:
    """Attached and healthy with the embedded model, which answers."""
    address = f"127.0.0.1:{_free_port()}"
    environment = {
        "APTSERVE_SCHEDULER_LISTEN": address,
        "APTSERVE_SCHEDULER_JOIN_TOKEN": "token",
    }
    with (
        _service("aptserve_scheduler", environment),
        image.run(_worker_environment(address, model="embedded")) as worker,
    ):
        worker.wait_healthy()
        answer = worker.execute(["aptserve", "generate", "def f", "-n", "4", "-a", address])
        if answer.returncode != 0 or not answer.stdout.strip():
            raise CheckError(f"no answer: {answer.stderr.strip()}")


def main() -> int:
    """Check the images named; 1 when one fails."""
    checks = {"scheduler": check_scheduler, "worker": check_worker}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("images", nargs="*", choices=[[], *checks], help="all by default")
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as for docker build"
    )
    parser.add_argument(
        "--reuse-packages",
        action="store_true",
        help="let the image see the packages of this environment; fast, and proves less",
    )
    options = parser.parse_args()
    build_args = dict(arg.split("=", 1) for arg in options.build_arg)
    site_packages = _site_packages() if options.reuse_packages else None
    for name in options.images or checks:
        with tempfile.TemporaryDirectory() as folder:
            path = ROOT / "docker" / f"Dockerfile.{name}"
            image = Image(path, Path(folder), build_args)
            try:
                image.build(site_packages)
                checks[name](image)
            except (CheckError, dockerfile.DockerfileError, subprocess.SubprocessError) as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                return 1
            print(f"{path.name}: installs, serves, is healthy, stops", flush=True)
    return 0


def _run(command: list[str], environment: Mapping[str, str], folder: Path, timeout: float) -> None:
    done = subprocess.run(command, env=environment, cwd=folder, timeout=timeout, check=False)
    if done.returncode != 0:
        raise CheckError(f"exit code {done.returncode} of {command[-1]}")


def _found(command: list[str], environment: Mapping[str, str]) -> list[str]:
    """The command with its program looked up on the image's path, not on ours."""
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise CheckError(f"{command[0]} is not in the image")
    return [program, *command[1:]]


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _share_packages(venv: Path, site_packages: Path | None) -> None:
    if site_packages is None:
        return
    for own in venv.glob("lib/python*/site-packages"):
        (own / "shared.pth").write_text(f"{site_packages}\n")


def _worker_environment(address: str, *, model: str) -> dict[str, str]:
    return {
        "APTSERVE_WORKER_SCHEDULER": address,
        "APTSERVE_WORKER_JOIN_TOKEN": "token",
        "APTSERVE_WORKER_MODEL": model,
    }


@contextmanager
def _service(module: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a service of this environment beside the image."""
    command = [sys.executable, "-m", module]
    with subprocess.Popen(command, env={**os.environ, **environment}) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_SECONDS)
            finally:
                process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + HEALTHY_TIMEOUT_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise CheckError(f"nothing listens at {address}") from None
            time.sleep(0.1)
        else:
            return


if __name__ == "__main__":
    sys.exit(main())
