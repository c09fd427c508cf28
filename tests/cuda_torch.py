"""A CUDA build of torch for a machine without a GPU: enough to build against it, and to run what needs no GPU.

`python tests/cuda_torch.py FOLDER 2.11.0` makes an environment in FOLDER. Torch's wheel goes in without what it depends
on (NVIDIA's libraries, gigabytes), the CUDA runtime apart. In place of each library that is then missing stands a stub:
its functions are there, and return 1, which all of these libraries take for an error.
"""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
# What torch imports, what a build of ours needs, and what the tests of the ops need
SMALL = ("filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "packaging")
SMALL += ("wheel", "ninja", "pybind11", "numpy", "safetensors")
SMALL += ("pytest", "iniconfig", "pluggy", "pygments", "pytest-timeout", "hypothesis", "sortedcontainers")


def make(folder: Path, torch_version: str) -> Path:
    """Makes the environment anew; returns its Python. CalledProcessError where pip finds no such wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    # ===: not a CPU build, whose version goes on with +cpu. Torch 2.11 takes no later setuptools than 81
    subprocess.run([*pip, f"torch==={torch_version}", "setuptools>=77,<82"], check=True)
    subprocess.run([*pip, "-c", str(CONSTRAINTS), *SMALL], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    metadata = next(site.glob("torch-*.dist-info/METADATA")).read_text()
    cuda = re.search(r"cuda-toolkit\[.*\]==(\d+\.\d+)", metadata)
    if cuda is None:
        raise RuntimeError(f"torch {torch_version} from this registry is no CUDA build")
    subprocess.run([*pip, f"nvidia-cuda-runtime=={cuda[1]}.*"], check=True)
    write_stubs(site / "torch" / "lib", [site / "nvidia" / f"cu{cuda[1].split('.')[0]}" / "lib"])
    return python


def write_stubs(libraries: Path, others: list[Path]) -> None:
    """Writes a stub beside torch's `libraries` for every library that they need and that is in no folder.

    A stub is an empty library of the right name that needs one common library, where every missing function is: the
    loader takes a function without a version from anywhere but from the very library that should have had one.
    """
    own = [path for path in libraries.glob("*.so*") if not path.name.startswith("libcaffe2_nvrtc")]
    needed = {name for path in own for name in re.findall(r"NEEDED\s+(\S+)", read("-p", path))}
    missing = sorted(name for name in needed if is_missing(name, [libraries, *others]))
    from_missing = {symbol for path in own for symbol in imports(path)} - {
        symbol for folder in (libraries, *others) for path in folder.glob("*.so*") for symbol in exports(path)
    }
    source = libraries / "stubs.c"
    source.write_text("".join(f"int {symbol}(void) {{ return 1; }}\n" for symbol in sorted(from_missing)))
    compile_shared(source, libraries / "librlhf_stubs.so")
    source.write_text("")
    for name in missing:
        compile_shared(source, libraries / name, "-Wl,--no-as-needed", f"-L{libraries}", "-lrlhf_stubs")
    source.unlink()


def is_missing(name: str, folders: list[Path]) -> bool:
    """Whether a library is neither in `folders` nor in the system."""
    return not any((folder / name).exists() for folder in folders) and not re.match(
        r"(ld-linux|libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|libgomp|libutil)[-.]", name
    )


def imports(library: Path) -> set[str]:
    """The functions that a library takes from NVIDIA's: theirs alone have C names that begin so."""
    names = re.findall(r"\*UND\*\s+\S+\s+(?:\S+\s+)?(\w+)$", read("-T", library), flags=re.MULTILINE)
    return {name for name in names if re.match(r"(_*cu|nccl|nv|_*nv)", name)}


def exports(library: Path) -> set[str]:
    return set(re.findall(r"^\S+ g\s.*\s(\w+)$", read("-T", library), flags=re.MULTILINE))


def read(what: str, library: Path) -> str:
    return subprocess.run(["objdump", what, str(library)], capture_output=True, text=True, check=True).stdout


def compile_shared(source: Path, target: Path, *flags: str) -> None:
    command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{target.name}", str(source), *flags]
    subprocess.run([*command, "-o", str(target)], check=True)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).resolve(), sys.argv[2]))
