"""The node a bundle is for: its Python, its platform, and what is installed there already."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

# Tags of the time before `manylinux_X_Y`, by the glibc minor version they stand for.
_LEGACY_TAGS = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


@dataclass(frozen=True)
class Target:
    """A Linux node: CPython `python` ("3.12"), a wheel platform tag, and installed packages.

    `have` maps canonical names to versions, None where the version is not known (any is then assumed to do).
    """

    python: str
    platform: str
    have: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"3\.\d+", self.python) or int(self.python.split(".")[1]) < 11:
            raise ValueError(f"Python version {self.python!r}: write it as 3.12; lrsa needs at least 3.11")
        self._glibc_and_machine()

    def _glibc_and_machine(self) -> tuple[int, str]:
        tag = self.platform
        for minor, legacy in _LEGACY_TAGS.items():
            tag = re.sub(rf"^{legacy}_", f"manylinux_2_{minor}_", tag)
        match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag)
        if not match:
            raise ValueError(
                f"platform {self.platform!r}: only Linux with glibc is supported, for instance manylinux_2_28_x86_64 "
                "(glibc 2.28 or newer; `ldd --version` on the node tells)"
            )
        return int(match[1]), match[2]

    @property
    def platform_tags(self) -> list[str]:
        """Every tag whose wheels run there, newest first: pip takes a tag literally, without the older ones."""
        glibc, machine = self._glibc_and_machine()
        tags = []
        for minor in range(glibc, 4, -1):
            tags.append(f"manylinux_2_{minor}_{machine}")
            if minor in _LEGACY_TAGS:
                tags.append(f"{_LEGACY_TAGS[minor]}_{machine}")
        return [*tags, f"linux_{machine}"]

    @property
    def marker_environment(self) -> dict[str, str]:
        """Environment markers as the node evaluates them, for `Marker.evaluate`."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self._glibc_and_machine()[1],
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


def read_installed(path: Path) -> dict[str, str | None]:
    """Names and versions from a node's `pip list --format=freeze` or `pip freeze`; bare names are taken as well.

    Raises ValueError naming file and line for a line that is neither.
    """
    found: dict[str, str | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text or text.startswith("-"):  # editable installs and options carry no version
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise ValueError(
                f"{path}:{number}: {text!r} is not a line of `pip list --format=freeze` ({error})"
            ) from None
        pins = [spec.version for spec in requirement.specifier if spec.operator in ("==", "===")]
        found[canonicalize_name(requirement.name)] = pins[0] if pins else None
    return found


def read_pins(path: Path) -> dict[str, str]:
    """Canonical name to version, from a constraints file of `name==version` lines."""
    return {name: version for name, version in read_installed(path).items() if version is not None}
