"""Model card of an exported network: architecture, preprocessing, accuracy, provenance."""

import datetime
from collections.abc import Mapping
from typing import Any

from etils import epath

from disco_jax import models
from disco_jax.evaluate.open_model import OpenedModel
from disco_jax.version import __version__


def write(
    path: epath.Path, opened: OpenedModel, exported: Mapping[str, Any], size: int, with_head: bool
) -> epath.Path:
    """Writes the model card to `path` + ".md".

    Args:
      path: the exported file.
      opened: the network.
      exported: the results of `export.run`.
      size: side of the images for which the errors were measured, in px.
      with_head: the export includes the projection head.

    Returns:
      The path of the card.
    """
    target = path.parent / f"{path.name}.md"
    target.write_text("\n".join(_lines(path, opened, exported, size, with_head)) + "\n")
    return target


def _lines(path, opened, exported, size, with_head) -> list[str]:
    count = models.parameters(opened.encoder)
    preprocessing = opened.preprocessing
    head = opened.settings.student
    lines = [
        f"# {path.name}",
        "",
        f"{opened.backbone}, {count:,} parameters ({count / 2**20:.2f} M of 2^20) without a head.",
        f"Projection head: {f'{head.head}, {head.dim} wide' if with_head else 'left out'}.",
        f"Format: {exported['format']}."
        + (f" Load it into `{exported['model']}`." if exported.get("model") else ""),
    ]
    if "input" in exported:
        lines.append(f"Input `{exported['input']}`, result `{exported['result']}`.")
    lines += [f"Note: {note}" for note in exported["notes"]]
    lines += [
        "",
        "## Preprocessing",
        "",
        f"RGB; resize the shorter side to {preprocessing['resize']} px "
        f"({preprocessing['interpolation']}, antialiased); crop the central "
        f"{preprocessing['crop']} x {preprocessing['crop']} px; scale to [0, 1]; subtract the mean",
        f"{preprocessing['mean']} and divide by the standard deviation {preprocessing['std']}, by "
        "channel.",
        "",
        "## Checked",
        "",
        "Largest difference from the JAX network divided by its largest value, on noise images of "
        f"{size} px:",
        "",
        *(f"- {runtime}: {error:.1e}" for runtime, error in exported["errors"].items()),
        "",
        "## Provenance",
        "",
        *(f"- {name}: {value}" for name, value in opened.provenance.items()),
        f"- exported: {datetime.datetime.now(datetime.UTC):%Y-%m-%d} by disco_jax {__version__}",
    ]
    return lines
