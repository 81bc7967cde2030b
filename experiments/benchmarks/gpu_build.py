"""The CUDA kernels that `make gpu-check` compares: found, installed from wheels of an earlier run, or built from source."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from experiments.files import console

EXTENSIONS = {"mamba-ssm>=2.3": "selective_scan_cuda", "causal-conv1d>=1.6.2": "causal_conv1d_cuda"}
IMPORTED = ("einops", "transformers")  # by mamba_ssm wherever one begins; the rest that it requires is left out
TOOLS = ("setuptools", "wheel", "packaging", "ninja")  # a build without isolation finds these here or not at all
SWITCHES = {"MAMBA_FORCE_BUILD": "TRUE", "MAMBA_KEEP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_FORCE_BUILD": "TRUE"}
UNBUILT = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}


def compiler() -> Path | None:
    """nvcc: of $CUDA_HOME, else on the path, else where CUDA installs itself; one with its headers beside it if there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (
        [Path(home) / "bin" / "nvcc"]
        if home
        else [Path(shutil.which("nvcc") or "nvcc"), Path("/usr/local/cuda/bin/nvcc")]
    )
    found = [p for p in places if p.is_file()]
    return next(
        (p for p in found if (p.parents[1] / "include" / "cuda_runtime.h").exists()), found[0] if found else None
    )


def version(nvcc: Path | None) -> str:
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout if nvcc else ""
    return " ".join(re.findall(r"release.*", said)) or "none"


def bring(kernels: Path, folder: Path) -> None:
    """Let modules that were built elsewhere for this torch be found before all others, here and in commands.

    Args:
        kernels: a folder with wheels of the packages, or with what wheels hold: compiled modules and the packages beside them.
        folder: where wheels are unpacked.
    """
    wheels = [w for name in EXTENSIONS for w in sorted(kernels.glob(f"{plain(name).replace('-', '_')}-*.whl"))]
    place = kernels.resolve()
    if wheels:
        place = (folder / "unpacked").resolve()
        shutil.rmtree(place, ignore_errors=True)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as content:
                content.extractall(place)
    sys.path.insert(0, str(place))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    importlib.invalidate_caches()


def plain(requirement: str) -> str:
    """The name of a package without its versions."""
    return re.split("[<>=]", requirement)[0]


def provide(folder: Path, nvcc: Path | None, capability: str, kernels: Path | None = None) -> list[str]:
    """Find, install from the cache, or build the extensions.

    Args:
        folder: where wheels and the log of the build are kept.
        nvcc: the compiler.
        capability: of the device, such as "9.0".
        kernels: a folder with those that were built elsewhere; nothing is installed or built then.

    Returns:
        A sentence for each: what came of it.
    """
    wheels = folder / f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}-sm{capability}"
    said = []
    if kernels is not None:
        bring(kernels, folder)
    for requirement, extension in EXTENSIONS.items():
        found = importlib.util.find_spec(extension)
        if found or kernels is not None:
            place = Path(found.origin or "").parent if found else None
            missing = f"not in {kernels}, neither in a wheel nor as {extension}*{EXTENSION_SUFFIXES[0]}"
            said.append(f"{extension}: {missing if place is None else f'found in {place}'}")
            continue
        try:
            install(requirement, wheels, folder / "build.log", nvcc, capability)
            importlib.invalidate_caches()
            if not importlib.util.find_spec(extension):
                raise RuntimeError(f"the wheel in {wheels} was built without it; delete it to build it anew")
            said.append(f"{extension}: installed from {wheels}")
        except Exception as error:
            said.append(f"{extension}: not there: {line(error)}")
    return said


def install(requirement: str, wheels: Path, log: Path, nvcc: Path | None, capability: str) -> None:
    """Install a package from ``wheels``, which needs neither network nor compiler; build it into ``wheels`` first if it is not there.

    Raises:
        RuntimeError: it cannot be built; the message says why.
    """
    name = plain(requirement)
    if not list(wheels.glob(f"{name.replace('-', '_')}-*.whl")):
        build(requirement, wheels, log, nvcc, capability)
    from_cache = ("install", "--no-index", "--find-links", str(wheels))
    if name == "mamba-ssm" and not all(importlib.util.find_spec(module) for module in IMPORTED):
        if not list(wheels.glob("transformers-*.whl")):
            pip(log, {}, "wheel", "--wheel-dir", str(wheels), *IMPORTED)
        pip(log, {}, *from_cache, *IMPORTED)
    pip(log, {}, *from_cache, "--no-deps", "--force-reinstall", name)


def build(requirement: str, wheels: Path, log: Path, nvcc: Path | None, capability: str) -> None:
    """Build a package into ``wheels`` for this device alone."""
    if nvcc is None:
        raise RuntimeError(
            "no nvcc to build it with (--minutes 2 builds nothing); install the CUDA toolkit or set CUDA_HOME"
        )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja lies beside python
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    jobs = os.environ.get("MAX_JOBS") or str(
        max(min(os.cpu_count() or 1, int(gib / 4)), 1)
    )  # a compiler takes up to 4 GiB
    given = {
        **SWITCHES,
        "CUDA_HOME": str(nvcc.parents[1]),
        "TORCH_CUDA_ARCH_LIST": capability,
        "PATH": path,
        "MAX_JOBS": jobs,
    }
    check = [sys.executable, "-c", "import setuptools, wheel.bdist_wheel, packaging"]
    if subprocess.run(check, capture_output=True).returncode or not shutil.which("ninja", path=path):
        pip(log, given, "install", *TOOLS)
    options = ("--no-deps", "--no-build-isolation")
    with tempfile.TemporaryDirectory() as place:
        pip(log, {**given, **UNBUILT}, "download", *options, "--no-binary", ":all:", "--dest", place, requirement)
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
        setup = next(Path(place).glob("*/setup.py"))
        setup.write_text(own_flags(setup.read_text()))
        say(f"{requirement}: being built for compute capability {capability}, for minutes; log: {log}")
        pip(log, given, "wheel", *options, "--wheel-dir", str(wheels), str(setup.parent))


def own_flags(setup: str) -> str:
    """A setup.py without its architectures (all that nvcc knows) and its C++ standard (17, which a newer torch's headers refuse).

    torch's build then obeys TORCH_CUDA_ARCH_LIST and adds the standard that its headers need.
    """
    setup = re.sub(r'cc_flag\.append\("(-gencode|arch=[^"]*)"\)', "pass", setup)
    return re.sub(r'"-std=c\+\+\d+",?', "", setup)


def pip(log: Path, environment: dict[str, str], *arguments: str) -> None:
    """Run pip with its output at the end of ``log``; a RuntimeError names the first error in it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", *arguments]
    with log.open("ab") as out:
        start = out.tell()
        status = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        ).returncode
    if status:
        said = log.read_bytes()[start:].decode(errors="replace").splitlines()
        reason = next(
            (s.strip() for s in said if re.search(r"error: (?!subprocess)|No module", s, re.IGNORECASE)),
            f"status {status}",
        )
        raise RuntimeError(f"pip {arguments[0]}: {reason[:200]}; log: {log}")


def say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
