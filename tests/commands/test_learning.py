"""Tests that every method trains a small student in a few epochs, and that broken ones do not.

Scores are kNN accuracies on the 360 held-out digits, in percent; the teacher has 98. A threshold
lies eight points below the leave-one-out accuracy on the 1437 training digits, and at least five
points above that of the untrained student. The held-out digits were not used to choose it.
"""

import fcntl

import children
import pytest
from conftest import QUICK

from disco_jax import flags, methods

# Leave-one-out accuracy on the training digits with initial weights.
UNTRAINED = {"swav_disco": 78.7, "sslight_swav": 78.7}  # wider students
NARROW = 59.4  # all other students
AMONG = {  # leave-one-out accuracy on the training digits after training
    "seed": 89.8,
    "disco": 82.4,
    "retro": 94.4,
    "rkd": 78.2,
    "attention": 80.7,
    "squared_distance": 80.4,
    "barlow_twins": 78.4,
    "binary_contrast": 85.4,
    "online_clusters": 88.7,
    "pseudo_labels:clusters=64": 81.5,
    "simreg": 72.9,
    "compress": 83.7,
    "bingo": 92.0,
    "ressl": 68.6,
    "supervised": 90.5,
    "simclr": 87.5,
    "byol": 72.9,
    "dino": 77.3,
    "swav_disco": 94.1,
    "sslight_moco": 87.0,
    "sslight_swav": 92.6,
}
# Methods that cannot learn from targets that are shuffled among the images of a batch.
SHUFFLED = (
    "seed", "squared_distance", "barlow_twins", "simreg", "compress",
    "swav_disco", "sslight_swav",
)  # fmt: skip


def learning(test):
    """Marks a test that `launch/test.sh --learning` runs."""
    return pytest.mark.learning(pytest.mark.slow(test))


def score(folder, run, compiler=""):
    """Returns the score that `learning.py` prints for a run, on one device."""
    child = children.start("learning:print_scores", folder, run, XLA_FLAGS=compiler)
    output, _ = child.communicate(timeout=900)
    assert child.returncode == 0, output
    (line,) = (line for line in output.splitlines() if line.startswith("score "))
    print(line)
    assert line.split()[1] == run
    return float(line.split()[2])


def score_of_broken(folder, run):
    """Returns the score of a run that must not learn, whose compiler may be the quick one."""
    return score(folder, run, QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    """Folder with the teacher and its bags, which the first of the test processes trains."""
    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "learning"
    path.mkdir(exist_ok=True)
    with open(path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path / "score").exists():
            (path / "score").write_text(str(score(path, "teacher")))
    assert float((path / "score").read_text()) > 90
    return path


def floor(name):
    return max(AMONG[name] - 8, UNTRAINED.get(name, NARROW) + 5)


def test_every_objective_and_every_pretraining_recipe_has_a_test_here():
    """Recipes that are not trained here weight the objectives of some that are."""

    def objectives(recipe):
        fields = flags.load(recipe).objectives.items()
        return {name for name, settings in fields if settings.weight}

    trained = {name: objectives(name) for name in AMONG}
    assert set.union(*trained.values()) == set(methods.OBJECTIVES)
    for recipe in set(flags.recipes()) - {"demo"}:
        if "objectives" in flags.load(recipe):
            parts = objectives(recipe)
            assert parts == set.union(*(t for t in trained.values() if t <= parts)), recipe


@learning
@pytest.mark.parametrize("name", SHUFFLED)
def test_a_student_learns_and_not_from_what_is_so_of_other_images(name, folder):
    learned, broken = score(folder, name), score_of_broken(folder, f"{name}/shuffled")
    assert broken < floor(name) < learned


@learning
@pytest.mark.parametrize("name", [name for name in AMONG if name not in SHUFFLED])
def test_a_student_learns_and_not_from_a_loss_without_weight(name, folder):
    """Tests the methods that learn from shuffled targets too, by spreading queries among keys."""
    learned, broken = score(folder, name), score_of_broken(folder, f"{name}/weightless")
    assert broken < floor(name) < learned
