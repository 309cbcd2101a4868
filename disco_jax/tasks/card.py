"""The model card beside an export: what it is, how to feed it, where it came from."""

import datetime
from collections.abc import Mapping
from typing import Any

from etils import epath

from disco_jax import models
from disco_jax.tasks.opening import Opened
from disco_jax.version import __version__


def write(
    path: epath.Path, opened: Opened, exported: Mapping[str, Any], size: int, with_head: bool
) -> epath.Path:
    """Writes `path` with `.md` behind it.

    Args:
      path: of the export.
      opened: the network.
      exported: what `export.run` found out.
      size: of the images that the errors were measured with, px.
      with_head: whether the projection head is in it.

    Returns:
      The path of the card.
    """
    target = path.parent / f"{path.name}.md"
    target.write_text("\n".join(_lines(path, opened, exported, size, with_head)) + "\n")
    return target


def _lines(path, opened, exported, size, with_head) -> list[str]:
    count = models.parameters(opened.encoder)
    how = opened.preprocessing
    head = opened.config.student
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
        f"RGB; resize the shorter side to {how['resize']} px ({how['interpolation']}, antialiased);"
        f" crop the central {how['crop']} x {how['crop']} px; scale to [0, 1]; subtract the mean",
        f"{how['mean']} and divide by the standard deviation {how['std']}, by channel.",
        "",
        "## Checked",
        "",
        f"Largest difference from the network here over its largest value, on noise of {size} px:",
        "",
        *(f"- {runtime}: {error:.1e}" for runtime, error in exported["errors"].items()),
        "",
        "## Provenance",
        "",
        *(f"- {name}: {value}" for name, value in opened.provenance.items()),
        f"- exported: {datetime.datetime.now(datetime.UTC):%Y-%m-%d} by disco_jax {__version__}",
    ]
    return lines
