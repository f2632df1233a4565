"""The wheels that a target lacks: the closure of requirements, read from each wheel's own metadata.

pip cannot do this: it evaluates environment markers for the machine it runs on, even with `--python-version`, and
cannot be told what another machine has.
"""

from __future__ import annotations

import importlib.metadata
import zipfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from lrsa.bundle.target import Target


@dataclass
class Closure:
    """What a requirement needs on a target.

    `wheels`: canonical name to the wheel in the bundle. `assumed`: canonical name to the specifier that the target's
    own package has to satisfy. `replaced`: name to "old -> new", packages there whose version does not do.
    """

    wheels: dict[str, Path] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)


def read_requirements(wheel: Path) -> list[Requirement]:
    """The Requires-Dist entries of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA")]
        headers = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    return [Requirement(text) for text in headers.get_all("Requires-Dist") or []]


def _requirements_here(name: str) -> list[Requirement]:
    """The same for a distribution installed on this machine; none where it is not."""
    try:
        return [Requirement(text) for text in importlib.metadata.requires(name) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _applies(requirement: Requirement, extras: Iterable[str], target: Target) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({**target.marker_environment, "extra": extra}) for extra in extras)


def collect(
    roots: dict[Path, set[str]],
    target: Target,
    pins: dict[str, str],
    fetch: Callable[[str], Path],
    report: Callable[[str], None] = lambda line: None,
) -> Closure:
    """Wheels for all that `roots` (wheel -> extras wanted) require and `target` lacks.

    `fetch("name==version")` brings one wheel; versions come from `pins`, else from the requirement itself. Raises
    ValueError when the requirements on one package contradict its pinned version, naming who asks for what.
    """
    closure = Closure()
    asked: dict[str, list[tuple[Requirement, str]]] = {}
    seen_extras: dict[str, set[str]] = {}
    queue: deque[tuple[Requirement, str]] = deque()

    def enqueue(requirements: list[Requirement], extras: set[str], parent: str) -> None:
        queue.extend((r, parent) for r in requirements if _applies(r, extras, target))

    for wheel, extras in roots.items():
        name = canonicalize_name(parse_wheel_filename(wheel.name)[0])
        closure.wheels[name] = wheel
        enqueue(read_requirements(wheel), {"", *extras}, name)

    while queue:
        requirement, parent = queue.popleft()
        name = canonicalize_name(requirement.name)
        asked.setdefault(name, []).append((requirement, parent))
        new_extras = requirement.extras - seen_extras.setdefault(name, set())
        seen_extras[name] |= new_extras
        has = name in target.have
        version = target.have.get(name)
        if name in closure.wheels:
            if new_extras:
                enqueue(read_requirements(closure.wheels[name]), set(new_extras), name)
        elif has and (version is None or requirement.specifier.contains(version, prereleases=True)):
            # The target's own environment is taken to be whole, but an extra may be new to it.
            if new_extras:
                enqueue([r for r in _requirements_here(name) if not _applies(r, [""], target)], set(new_extras), name)
        else:
            wanted = f"{name}=={pins[name]}" if name in pins else f"{name}{requirement.specifier}"
            wheel = fetch(wanted)
            closure.wheels[name] = wheel
            report(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB  (for {parent})")
            if has:
                closure.replaced[name] = f"{version} -> {parse_wheel_filename(wheel.name)[1]}"
            enqueue(read_requirements(wheel), {"", *seen_extras[name]}, name)

    for package, requirements in asked.items():
        if package not in closure.wheels:
            specifiers = {str(spec) for requirement, _ in requirements for spec in requirement.specifier}
            closure.assumed[package] = ",".join(sorted(specifiers))
            continue
        fetched = parse_wheel_filename(closure.wheels[package].name)[1]
        for requirement, parent in requirements:
            if not requirement.specifier.contains(fetched, prereleases=True):
                raise ValueError(
                    f"{parent} needs {requirement}, but {package} {fetched} was chosen; pin another version in "
                    "constraints.txt, or leave the package out of the target's list"
                )
    return closure
