"""Collects the wheels that `benchmarks.device` needs where no network is.

python -m benchmarks.wheels FOLDER
python -m benchmarks.wheels FOLDER --python-version 3.12

That machine is taken to be an x86-64 Linux with glibc 2.28 or newer, PyTorch,
JAX and Python 3.11 or newer. What is needed besides stands in the metadata of
the wheels, from this package's on. Take the folder there and run the command
that is printed: it installs what is missing, and leaves alone what is there.
"""

import argparse
import importlib.metadata
import pathlib
import platform
import re
import subprocess
import sys
import zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.utils import parse_wheel_filename

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "keras-fvae[hub]"
# JAX has NumPy. KerasHub does without TensorFlow, as nothing is preprocessed.
LEFT_OUT = {"numpy", "tensorflow-text"}
# Which must not be older there, as all else may be.
PINNED = {"keras", "keras-hub", "keras-fvae"}
# To pip, what runs on glibc 2.28 is not what runs on an older one.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument(
        "--python-version",
        type=python_version,
        default=".".join(platform.python_version_tuple()[:2]),
        help="of the machine without a network (default: that of this one)",
    )
    options = parser.parse_args(arguments)
    folder = options.folder
    collect(folder, options.python_version)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    names = " ".join(
        f"{name}=={version}" if name in PINNED else name
        for name, (version, _) in sorted(wheels(folder).items())
    )
    print(f"{size / 2**20:.0f} MiB of wheels. Where they are needed:\n")
    install = "python3 -m pip install --no-index --no-deps --find-links"
    print(f"{install} {folder} {names}")


def python_version(text):
    """An argument of the command line, such as "3.12"."""
    if not re.fullmatch(r"3\.[0-9]+", text):
        raise argparse.ArgumentTypeError(
            f"a version of Python, such as 3.12, is needed, not '{text}'"
        )
    return text


def collect(folder, python_version):
    """Puts the wheels of this package and of all that it needs into a folder.

    pip itself would bring TensorFlow, so it is asked for one generation after
    the other, without what each of them needs.
    """
    pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    names, wanted = set(), {Requirement(PACKAGE)}
    while wanted:
        names |= {canonicalize_name(each.name) for each in wanted}
        found = wheels(folder)
        wanted = {
            need
            for each in wanted
            for need in needs(each, found, python_version)
            if canonicalize_name(need.name) not in names | LEFT_OUT
        }
        if wanted:
            download(wanted, folder, python_version)


def wheels(folder):
    """Dict of the version and the path of each wheel, by name."""
    return {
        name: (version, path)
        for path in folder.glob("*.whl")
        for name, version, *_ in [parse_wheel_filename(path.name)]
    }


def needs(requirement, found, python_version):
    """List of what the wheel of a requirement requires there."""
    version, path = found[canonicalize_name(requirement.name)]
    prefix = path.name.split(f"-{version}")[0]
    information = zipfile.Path(path, f"{prefix}-{version}.dist-info/")
    requires = importlib.metadata.PathDistribution(information).requires
    return [
        need
        for need in map(Requirement, requires or [])
        for extra in requirement.extras or [""]
        if need.marker is None
        or need.marker.evaluate(
            {"python_version": python_version, "extra": extra}
        )
    ]


def download(requirements, folder, python_version):
    """Downloads the wheels of these, in the versions that are tested."""
    pip(
        "download", "--no-deps", "--only-binary", ":all:", "--dest", folder,
        "--constraint", ROOT / "constraints.txt",
        "--implementation", "cp", "--python-version", python_version,
        *(f"--platform={platform}" for platform in PLATFORMS),
        *(f"{each.name}{each.specifier}" for each in requirements),
    )  # fmt: skip


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
