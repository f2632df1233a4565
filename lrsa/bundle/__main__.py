"""`python -m lrsa.bundle`, behind `make bundle`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from lrsa import __version__
from lrsa.bundle.folder import copy_into, split, write_manifest
from lrsa.bundle.pip import PipError, Runner, build_project, fetch_wheel, run_pip
from lrsa.bundle.smollm2 import FOLDER_NAME, fetch_smollm2
from lrsa.bundle.target import Target, read_installed, read_pins
from lrsa.bundle.wheels import collect

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lrsa.bundle",
        description="Collect what a Linux node without a network needs to run lrsa: wheels, model, data, install.py.",
    )
    parser.add_argument("--python-version", required=True, help="the node's Python, e.g. 3.12")
    parser.add_argument("--platform", required=True, help="its newest wheel tag, e.g. manylinux_2_28_x86_64")
    parser.add_argument("--have", type=Path, help="its `pip list --format=freeze`: only what it lacks is collected")
    parser.add_argument("--extras", default="", help="extras of lrsa, separated by commas, e.g. flash4")
    parser.add_argument("--model", help="smollm2, or a model folder")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="data folders or files")
    parser.add_argument("--split-mb", type=int, help="cut the bundle into parts of at most this many MB (10^6 bytes)")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; a bundle already there is replaced"
    )
    return parser.parse_args(arguments)


def prepare(output: Path) -> None:
    """An empty folder; refuses to empty one that is not a bundle."""
    if output.exists() and any(output.iterdir()):
        if not (output / "install.py").is_file():
            raise ValueError(f"{output} is neither empty nor a bundle: name another folder")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)


def make_bundle(options: argparse.Namespace, runner: Runner = run_pip) -> Path:
    """Write the bundle that `options` describe; returns its folder.

    Raises PipError or ValueError, each saying what to do; a half-made bundle has no manifest and does not install.
    """
    have = read_installed(options.have) if options.have else {}
    target = Target(options.python_version, options.platform, have)
    pins = read_pins(ROOT / "constraints.txt")
    output: Path = options.output
    for source in options.data:
        if not source.exists():
            raise ValueError(f"no such file or folder: {source}")
    prepare(output)
    (output / "install.py").touch()  # so that a half-made bundle can be replaced
    wheels = output / "wheels"
    wheels.mkdir()

    print(f"wheels for Python {target.python} on {target.platform}, {len(have)} packages there already", flush=True)
    own = build_project(ROOT, wheels, runner)
    extras = {name.strip() for name in options.extras.split(",") if name.strip()}
    closure = collect(
        {own: extras},
        target,
        pins,
        fetch=lambda requirement: fetch_wheel(requirement, target, wheels, runner),
        report=lambda line: print(f"  {line}", flush=True),
    )
    for name, change in closure.replaced.items():
        print(
            f"warning: {name} {change}: what the node has does not satisfy lrsa and will be replaced", file=sys.stderr
        )

    model = None
    if options.model == "smollm2":
        model = f"models/{FOLDER_NAME}"
        local = ROOT / model
        fetch_smollm2(local, runner)
        copy_into(local, output / "models")
    elif options.model:
        model = f"models/{copy_into(Path(options.model), output / 'models').name}"
    data = [f"data/{copy_into(source, output / 'data').name}" for source in options.data]

    environment = {}  # the variables that the configs read
    if options.model == "smollm2":
        environment["LRSA_SMOLLM2"] = f"models/{FOLDER_NAME}"
    if data:
        environment["LRSA_DATA"] = "data"

    facts = {
        "lrsa": __version__,
        "python_version": target.python,
        "platform": target.platform,
        "assumed": dict(sorted(closure.assumed.items())),
        "replaced": closure.replaced,
        "model": model,
        "data": data,
        "environment": environment,
    }
    manifest = write_manifest(output, facts)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{len(closure.wheels)} wheels, {len(manifest['files'])} files, {total / 1e6:.1f} MB in {output}")
    if options.split_mb is not None:
        parts = split(output, options.split_mb * 1_000_000)
        print(f"cut into {len(parts)} parts of at most {options.split_mb} MB; bring them and install.py, parts.json")
    print(f"on the node, in one folder: python{target.python} install.py")
    return output


def main() -> int:
    """Command line; returns the exit status."""
    try:
        make_bundle(parse(sys.argv[1:]))
    except (PipError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
