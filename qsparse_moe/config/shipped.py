"""The configurations, grids, and examples that are installed with the package. Imports no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qsparse_moe.errors import ConfigError

Kind = Literal["config", "grid", "example"]

# Links to the folders of the same name in a checkout; a wheel contains copies of the files.
_FOLDER = Path(__file__).resolve().parent.parent / "shipped"
SCHEMA = _FOLDER / "configs" / "schema.json"
"""JSON schema of a configuration, for editors."""


@dataclass(frozen=True)
class Shipped:
    """One file that is installed with the package."""

    name: str
    """Such as ``tiny``, ``recipes/mixtral-8x7b``, ``ablations/sparsity`` or ``examples/training_loop``."""
    kind: Kind
    path: Path

    @property
    def summary(self) -> str:
        """The first sentence of the file's leading comment or docstring."""
        if self.path.suffix == ".ipynb":
            return "Read the metrics of a run in a notebook."
        lines = self.path.read_text(encoding="utf-8").splitlines()
        # This line is for editors and says nothing about the content.
        comments = [line for line in lines if not line.startswith("# yaml-language-server")]
        text = " ".join(line.strip('#" ') for line in comments[:6] if line.startswith(("#", '"""')))
        # A grid gives its command behind its question, in the same sentence.
        return text.split(". ")[0].split(": qsparse-moe")[0].split("? qsparse-moe")[0].rstrip(".") + "."


def shipped_files() -> dict[str, Shipped]:
    """Return every shipped file by its name."""
    configs, examples = _FOLDER / "configs", _FOLDER / "examples"
    found = [
        Shipped(_name(path, configs), "grid" if path.parent.name == "ablations" else "config", path)
        for folder in (configs, configs / "recipes", configs / "ablations")
        for path in sorted(folder.glob("*.yaml"))
    ]
    found += [
        Shipped(f"examples/{path.stem}", "grid" if path.suffix == ".yaml" else "example", path)
        for path in sorted(examples.glob("*"))
        if path.suffix in (".py", ".yaml", ".ipynb")
    ]
    return {file.name: file for file in found}


def shipped(name: str) -> Shipped:
    """Return the shipped file ``name``.

    Raises:
        ConfigError: there is no such file; with the nearest names.
    """
    files = shipped_files()
    wanted = name.removesuffix(".yaml").removesuffix(".py").removesuffix(".ipynb").removeprefix("configs/")
    if wanted in files:
        return files[wanted]
    # A recipe is known by its model, so mixtral-8x7b is enough for recipes/mixtral-8x7b where it is unique.
    by_stem = [file for file in files if file.rsplit("/", 1)[-1] == wanted]
    if len(by_stem) == 1:
        return files[by_stem[0]]
    # The default cutoff of 0.6 is too strict for a model's name without folder and size, such as mixtral.
    nearest = difflib.get_close_matches(wanted, files, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else f"choose from {', '.join(files)}"
    raise ConfigError(f"{name!r} is not a configuration, grid, or example of this package; {hint}")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()
