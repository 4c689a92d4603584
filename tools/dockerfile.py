"""Reads the part of the Dockerfile language that our Dockerfiles use."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field


class DockerfileError(Exception):
    """An instruction that this reader does not know; the message names its line."""


@dataclass(frozen=True)
class Instruction:
    """One instruction with its flags split off: ``COPY --from=build /a /b``."""

    name: str
    flags: dict[str, str]
    value: str
    line: int

    @property
    def command(self) -> list[str]:
        """The command of RUN, CMD or ENTRYPOINT: its JSON form, or a shell with the shell form."""
        if self.value.startswith("["):
            return [str(part) for part in json.loads(self.value)]
        return ["/bin/sh", "-c", self.value]

    @property
    def assignments(self) -> dict[str, str]:
        """``NAME=value`` pairs of ENV or ARG; an ARG without a default is empty."""
        return {
            name: value for name, _, value in (p.partition("=") for p in shlex.split(self.value))
        }


@dataclass
class Stage:
    """A FROM and what follows it."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, name: str) -> Instruction | None:
        """The last instruction of a kind, which is the one in force."""
        found = [instruction for instruction in self.instructions if instruction.name == name]
        return found[-1] if found else None


_STAGE_INSTRUCTIONS = frozenset(
    {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "HEALTHCHECK", "RUN", "USER", "VOLUME"}
    | {"WORKDIR"}
)


def parse(text: str) -> list[Stage]:
    """The stages, in order. Raises :class:`DockerfileError`."""
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            base, _, name = re.split(r"\s+(AS)\s+|$", instruction.value, maxsplit=1)
            stages.append(Stage(name or "", base))
        elif stages and instruction.name in _STAGE_INSTRUCTIONS:
            stages[-1].instructions.append(instruction)
        elif stages or instruction.name != "ARG":  # an ARG before FROM is for FROM alone
            raise DockerfileError(f"line {instruction.line}: {instruction.name} is not known here")
    return stages


def healthcheck_command(instruction: Instruction) -> list[str]:
    """The command of a HEALTHCHECK."""
    name, _, value = instruction.value.partition(" ")
    if name != "CMD":
        raise DockerfileError(f"line {instruction.line}: HEALTHCHECK without CMD")
    return Instruction("CMD", {}, value.strip(), instruction.line).command


def _instructions(text: str) -> list[Instruction]:
    found: list[Instruction] = []
    pending, first_line = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not (line.strip() or pending):
            continue
        first_line = first_line if pending else number
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1].rstrip() + " "
            continue
        found.append(_instruction(pending, first_line))
        pending = ""
    return found


def _instruction(text: str, line: int) -> Instruction:
    name, _, value = text.partition(" ")
    flags: dict[str, str] = {}
    while match := re.match(r"--([a-z-]+)=(\S+)\s*", value.lstrip()):
        flags[match[1]] = match[2]
        value = value.lstrip()[match.end() :]
    return Instruction(name.upper(), flags, value.strip(), line)
