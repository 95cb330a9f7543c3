"""pip install . makes one package `fmem` of the rooms of this repository.

fmem.py is what `import fmem` gives, the others are its parts (fmem.training, fmem.data, ...), the scripts are fmem.commands. So
nothing but `fmem` gets into site-packages. Imports, and the commands that messages name, are rewritten to fit; pyproject.toml has
the rest.
"""
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ROOMS, SCRIPTS = ("fast", "variants", "training", "sampling", "inside", "data"), ("train", "sample", "look")


def packaged(source):
    """The code of a file for its place in the package."""
    source = re.sub(rf"^(\s*)import ({'|'.join(ROOMS)}|kernel)$", r"\1from fmem import \2", source, flags=re.MULTILINE)
    source = re.sub(rf"^(\s*)from ({'|'.join(ROOMS)}|kernel)\b", r"\1from fmem.\2", source, flags=re.MULTILINE)
    source = re.sub(rf"python ({'|'.join(SCRIPTS)})\.py", r"fmem-\1", source)
    return source.replace("python data/prepare.py", "fmem-prepare")


def files():
    """{path in the package: file of the repository}"""
    made = {"__init__.py": ROOT / "fmem.py", "kernel.py": ROOT / "kernel.py"}
    made |= {f"commands/{name}.py": ROOT / f"{name}.py" for name in SCRIPTS}
    for room in ROOMS:
        made |= {f"{room}/{file.name}": file for file in sorted((ROOT / room).iterdir())
                 if file.suffix in (".py", ".html", ".css", ".js")}
    return made


class Build(build_py):
    def run(self):
        if self.editable_mode:
            raise SystemExit("fmem cannot be installed with --editable: work in the checkout, or pip install .")
        for name, file in files().items():
            target = Path(self.build_lib) / "fmem" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text(encoding="utf-8")
            target.write_text(packaged(text) if file.suffix == ".py" else text, encoding="utf-8")
        (Path(self.build_lib) / "fmem/commands/__init__.py").touch()

    def get_source_files(self):
        return [str(file.relative_to(ROOT)) for file in files().values()]

    def get_outputs(self, include_bytecode=1):
        return [str(Path(self.build_lib) / "fmem" / name) for name in [*files(), "commands/__init__.py"]]


if __name__ == "__main__":
    setup(packages=["fmem"], cmdclass={"build_py": Build})
