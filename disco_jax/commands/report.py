"""Write the report of a run: one self-contained page and its figures."""

import logging
from collections.abc import Sequence

from etils import epath

from disco_jax import errors, flags
from disco_jax.arguments import Parser
from disco_jax.data import pipeline
from disco_jax.data.contract import Source
from disco_jax.report import build, runs, sheet
from disco_jax.run import workdir as directory
from disco_jax.train import stored_settings

_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax report --workdir RUN`."""
    parser = Parser("report", __doc__)
    parser.add_argument("--workdir", required=True, help="the run's directory")
    values = parser.read(argv)
    if values is not None:
        flags.prepare_jax(workdir=values.workdir)
        print(f"Report: {run(values.workdir)}")


def run(workdir: str, source: Source | None = None) -> str:
    """Writes report.html and figures/*.png.

    Draws the contact sheet too if the run has none yet and its data can be opened.

    Args:
      workdir: directory of a pretraining run or an import.
      source: images; None opens the data of the run.

    Returns:
      The path of the page.

    Raises:
      UserError: the directory is not a run.
    """
    config = directory.read_config(workdir)
    if "objectives" in config and not _has_sheet(workdir):
        try:
            settings = stored_settings.read(workdir)
            sheet.draw(settings, workdir, source or pipeline.open_source(settings.data))
        except (errors.UserError, OSError) as error:
            _LOG.warning("No contact sheet: %s", error)
    return str(build.write(workdir))


def _has_sheet(workdir: str) -> bool:
    return (epath.Path(workdir) / runs.FIGURES / f"{build.SHEET}.png").exists()
