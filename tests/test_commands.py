"""Runs the command blocks of README.md and docs/*.md, on small networks and few images.

`small` replaces arguments that would take hours or need networks or data sets that are missing
here. Not run are `plan`, which is tested with the TPU compiler in tests/commands/test_plan.py, and
programs other than `disco-jax`. A pretraining that differs from an earlier one only in names of
directories is not repeated; its run directory is copied.
"""

import re
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from test_docs import PAGES, commands

import helpers
from disco_jax import flags, main, models
from disco_jax.commands import importing, linear
from disco_jax.commands import list as listing
from disco_jax.convert import save
from disco_jax.plan import budget

BLOCKS = [
    (path, number, block)
    for path in PAGES
    for number, block in enumerate(
        re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S)
    )
    if any(words[0] != "plan" for words in commands(block))
]
# Only exit codes are checked; no number is compared.
pytestmark = pytest.mark.wiring
CHECKPOINT = "moco_v2_800ep_pretrain.pth.tar"
RUNS = (
    "runs/disco", "runs/moco_v2", "runs/student", "RUN", "OTHER", "TEACHER", "BASELINE", "STUDENT",
)  # fmt: skip
IMPORTS = "runs/my_teacher", "runs/moco_r50", "runs/teacher", "gs/teacher", "gs/moco_v2"
# Imports of the same network that serve as teachers. `runs/teacher` may also be a run.
TAUGHT_BY = "runs/my_teacher", "runs/moco_r50", "gs/teacher", "gs/moco_v2"
NETWORKS = "resnet18", "resnet50", "mobilenetv3_large"
# Additional arguments by task that reduce the work.
OF_DATA = ("--config.data.source=npz", "--config.data.dir=few.npz")
TRAIN = (
    *OF_DATA, "--config.student.width=4", "--config.teacher.width=4", "--config.augment.size=16",
    "--config.total_steps=2", "--config.batch_size=32", "--config.student.hidden=16",
    "--config.objectives.contrast.queue_size=64", "--config.log.report=false", *(
        f"--config.augment.{name}_prob=0" for name in ("jitter", "grey", "blur")
    ),
)  # fmt: skip
PROBE = (
    "--config.total_epochs=1", "--config.batch_size=32", "--config.extract_batch_size=32",
    "--config.report=false",
)  # fmt: skip
ONE_CELL = (
    "--config.axes=(('student', ('resnet8',)), ('config.student.hidden', (8,)))",
    "--config.evaluate=(('linear', (('total_epochs', 1), ('report', False))),)",
)
LESS = {
    "pretrain": TRAIN,
    "distill": (
        "--config.total_steps=2",
        "--config.student.width=4",
        "--config.augment.size=16",
    ),
    "knn": ("--config.report=false",),
    "linear": PROBE,
    "semi": PROBE,
    "finetune": PROBE,
    "transfer": (
        *PROBE,
        "--config.data.name=",
        "--config.data.dir=few.npz",
        "--config.data.size=16",
        "--config.data.eval_resize=16",
    ),
    "tsne": ("--config.images_per_class=6", "--config.perplexity=4"),
    "cost": ("--config.repeats=1",),
    "cache": (*TRAIN, "--epochs=1"),
    "sweep": (
        "--config.changes=(('log.report', False), ('data.source', 'npz'), ('data.dir', 'few.npz'), "
        "('augment.size', 16), ('student.width', 4), ('teacher.width', 4))",
    ),
    "bags": (*OF_DATA, "--config.neighbours=3", "--config.clusters=3"),
    "export": ("--format=safetensors",),
}


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory):
    """Shares the compilation cache between commands, but not with other tests or the user."""
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def one_block():
    """Reduces `resnet8` to one block, so that its programs compile quickly."""
    cls, fields = models.BACKBONES["resnet8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.BACKBONES, "resnet8", (cls, {**fields, "stage_sizes": (1,)}))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with everything that the pages assume: data, images, runs, a checkpoint."""
    folder = tmp_path_factory.mktemp("place")
    digits = helpers.digits()
    few = {key: x[: 128 if key.startswith("train") else 60] for key, x in digits.items()}
    np.savez(folder / "few.npz", **few)
    for i in range(40):
        image, label = few["train_images"][i], few["train_labels"][i]
        name = folder / "photos" / "train" / str(label) / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(name)
    # Folders whose splits have other names, or none; see docs/data.md.
    for name in ("scans/Training set/a", "scans/Holdout/a", "vehicles/train", "vehicles/bus"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(few["train_images"][0].squeeze()).save(folder / name / "0.png")
    for seed, run in enumerate(RUNS):
        helpers.network_run(folder / run, folder / "few.npz", seed=seed)
    finetune = flags.load("finetune")
    finetune.update(total_epochs=1, batch_size=32, report=False)
    linear.run(finetune, str(folder / "TEACHER"))
    encoder = models.build_encoder(helpers.encoder_spec("resnet8", width=4, hidden=8, dim=16))
    state = save.state_dict("resnet8", encoder, encoder.create(0, 32), "moco", with_head=True)
    save.write(folder / CHECKPOINT, state, "moco")
    for run in IMPORTS:
        importing.run(str(folder / CHECKPOINT), str(folder / run))
    return folder


@pytest.fixture(scope="module")
def pretrained():
    """Map from `but_for_names` of a pretraining to its run directory, filled by the tests."""
    return {}


def small(words):
    """Returns a command that uses the files of `place` and takes seconds."""
    task, *rest = words
    reduced = []
    for word in rest:
        if word.startswith("--config.data.dir=gs:"):
            continue  # few.npz is used instead
        word = word.replace("gs://BUCKET/", "gs/")
        for name in NETWORKS:
            word = re.sub(rf"(student|teacher)={name}\b", r"\1=resnet8", word)
        if task in ("pretrain", "cache") and "configs/" in word:
            recipe, _, args = word.partition(":")
            networks = "student=resnet8" + (",teacher=resnet8" if "disco" in recipe else "")
            word = f"{recipe}:{args or networks},data=digits,smoke=true"
        if task == "sweep":
            word = word.replace("hidden_width", "hidden_width:smoke=true")
            if word.startswith("miniature"):
                word = word.partition(":")[0] + ":smoke=true"
            word = word.replace("runs/my_teacher", "random")
        if word in NETWORKS:
            word = "resnet8"
        word = word.replace("imagenet2012", "few.npz" if task == "data" else "digits")
        reduced.append(word)
    if "sweeps/hidden_width:smoke=true" in reduced:
        reduced += ONE_CELL
    if any(word.startswith("miniature") for word in reduced):  # too many runs to train
        reduced += ["--dry-run", "--config.seeds=(0,)"]
    if task == "export":  # the other formats have no layout for resnet8; see test_export.py
        start = reduced.index("--format")
        reduced = reduced[:start] + reduced[start + 2 :]
    if task in ("linear", "semi", "finetune") and any(run in reduced for run in IMPORTS):
        reduced += [*OF_DATA, "--config.data.size=16"]  # the default of an import is ImageNet
    return [task, *reduced, *LESS.get(task, ())]


def but_for_names(words):
    """Returns a key of a pretraining command that ignores the names of its run and its teacher."""
    line = re.sub(r"--workdir[ =]\S+", "", " ".join(words))
    return frozenset(re.sub("|".join(TAUGHT_BY), "IMPORT", line).split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, number, block", BLOCKS, ids=[f"{path.name}-{number}" for path, number, _ in BLOCKS]
)
def test_a_block_of_commands_runs(
    path, number, block, place, pretrained, tmp_path, monkeypatch, capsys
):
    here = tmp_path / "here"
    shutil.copytree(place, here)
    monkeypatch.chdir(here)
    for words in commands(block):
        if words[0] == "plan":
            continue
        words = small(words)
        if words[0] in ("pretrain", "distill", "import"):  # creates a run directory
            run = re.search(r"--workdir[ =](\S+)", " ".join(words))[1]
            shutil.rmtree(run, ignore_errors=True)
        if words[0] == "list":  # would count the parameters of every network: 20 seconds
            one = listing._millions("resnet8")
            monkeypatch.setattr(listing, "_millions", lambda _, one=one: one)
        if words[0] == "sweep" and words[2].startswith("miniature"):  # would trace 29 steps
            monkeypatch.setattr(budget, "flops", lambda *_: 1e9)
        if words[0] == "pretrain" and but_for_names(words) in pretrained:
            shutil.copytree(pretrained[but_for_names(words)], run)
            continue
        code = main.main(words)
        captured = capsys.readouterr()
        assert code == 0, f"{words}\n{captured.out[-2000:]}\n{captured.err}"
        if words[0] == "pretrain":
            pretrained[but_for_names(words)] = here / run


def test_most_blocks_are_run():
    assert len(BLOCKS) > 9
    assert {words[0] for _, _, block in BLOCKS for words in commands(block)} > {
        "pretrain", "distill", "import", "export", "embed", "knn", "linear", "bags", "compare",
        "sweep", "cache",
    }  # fmt: skip
