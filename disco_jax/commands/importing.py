"""Import a PyTorch checkpoint as a run directory, with a manifest of its source."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from disco_jax import convert, flags
from disco_jax.arguments import Parser
from disco_jax.convert.manifest import MANIFEST, config_of, describe
from disco_jax.convert.recognise import FAMILIES
from disco_jax.convert.text import listed
from disco_jax.files import IMPORTING, whole
from disco_jax.run import checkpoint
from disco_jax.run import workdir as directory
from disco_jax.run.workdir import claim
from disco_jax.train import teacher
from disco_jax.train.state import TrainState

_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax import FILE --workdir W [--family F] [--arch A] [--allow X ...]`."""
    parser = Parser("import", __doc__)
    parser.add_argument("file", help=".pth, .pth.tar, .pt, .pkl, .safetensors or an index")
    parser.add_argument("--workdir", required=True, help="directory to write the network to")
    parser.add_argument("--family", default="", help=f"one of {', '.join(FAMILIES)}")
    parser.add_argument("--arch", default="", help="a network listed by disco-jax list")
    parser.add_argument(
        "--entry", default="", help="entry of the file with the weights, e.g. student"
    )
    parser.add_argument(
        "--prefix", help="prefix of the network's keys if a file holds several networks"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        help="pattern of keys that may be left over (an unsupported head is left out completely) "
        "or of weights that may be missing",
    )
    arguments = parser.read(argv)
    if arguments is not None:
        flags.prepare_jax()
        run(**vars(arguments))


def run(
    file: str,
    workdir: str,
    *,
    family: str = "",
    arch: str = "",
    entry: str = "",
    prefix: str | None = None,
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Imports a checkpoint; the directory can then be a teacher, be evaluated and exported.

    Args:
      file: see `convert.load`.
      workdir: a directory that does not exist yet or is empty.
      entry: see `convert.read`.
      family, arch, prefix, allow: see `convert.from_mapping`.

    Returns:
      The manifest, as written to `workdir`/manifest.json.

    Raises:
      UserError: see `convert.load`; or the directory cannot be used. Nothing new remains on disk.
    """
    imported = convert.read_network(
        file, entry=entry, family=family, arch=arch, prefix=prefix, allow=allow
    )
    manifest = describe(imported, file)
    with _removed_on_failure(epath.Path(workdir)), claim(workdir, config_of(imported)) as path:
        with contextlib.closing(checkpoint.Checkpoints(path)) as checkpoints:
            checkpoints.save(0, _state(imported), [[0, 0]], {})
            checkpoints.wait()
        with whole(path / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    _print(imported, manifest, workdir)
    return manifest


def _state(imported: convert.Imported) -> TrainState:
    queue = imported.queue
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=imported.variables,
        momentum={},
        memory={} if queue is None else {"contrast": {teacher.KEYS: queue}},
        opt_state=(),
    )


@contextlib.contextmanager
def _removed_on_failure(path: epath.Path) -> Iterator[None]:
    """Refuses a directory that is not empty; removes all new files if the import fails.

    A mark in the directory identifies the files of a killed import, which are removed first.
    """
    mark = path / IMPORTING
    if mark.exists():
        _remove(path, before=json.loads(mark.read_text() or "[]"))
    directory.check_free(path)
    existed = path.exists()
    before = [entry.name for entry in path.iterdir()] if existed else []
    path.mkdir(parents=True, exist_ok=True)
    with whole(mark) as unfinished:
        unfinished.write_text(json.dumps(before))
    try:
        yield
        mark.unlink()
    except BaseException:
        _remove(path, before)
        if not existed:
            path.rmdir()
        raise


def _remove(path: epath.Path, before: Sequence[str]) -> None:
    """Removes the entries of a directory that are not in `before`; the mark last."""
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name == IMPORTING):
        if entry.name not in before:
            entry.rmtree() if entry.is_dir() else entry.unlink()


def _print(imported: convert.Imported, manifest: dict[str, Any], workdir: str) -> None:
    if jax.process_index():
        return
    spec, counts = imported.spec, manifest["parameters"]
    print(
        f"{spec['backbone']} ({imported.family}, layout {imported.layout}): "
        f"{counts['backbone'] / 2**20:.2f} M parameters without the head "
        f"({counts['backbone']:,}; M = 2^20, as the papers count)."
    )
    print(
        f"Head {spec['head']!r}: {counts['head'] / 2**20:.2f} M, embedding of width {spec['dim']}"
        + (f", prototypes {sum(spec['prototypes'])}" if spec["prototypes"] else "")
        + ("" if imported.queue is None else f"; queue of {manifest['queue'][0]} keys")
        + "."
    )
    if imported.classifiers:
        print(f"Left out as classifiers: {listed(imported.classifiers)}.")
    print(
        f"{len(imported.keys)} arrays imported, {len(imported.unused_keys)} not "
        f"({workdir}/{MANIFEST} lists them). To use the network as a teacher, set "
        f"--config.teacher.weights={workdir}"
    )
