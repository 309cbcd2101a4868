"""`disco-jax export` and `embed`: networks and features are written, run again and compared."""

import io
import os
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

import helpers
from disco_jax import convert, main, models
from disco_jax.commands import embed, export, importing
from disco_jax.convert import pickles, save
from disco_jax.data import decode
from disco_jax.errors import UserError
from disco_jax.evaluate.open_model import open_model


def scrambled(backbone, seed=0, size=32, **fields):
    """Returns an encoder and variables drawn by NumPy, which compiles nothing; none is 0 or 1."""
    encoder = models.build_encoder(helpers.encoder_spec(backbone, **fields))
    rng = np.random.default_rng(seed)

    def draw(path, x):
        if path[-1].key in ("kernel", "embedding"):
            return rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32)
        low, high = (0.5, 1.5) if path[-1].key in ("var", "scale") else (-0.1, 0.1)
        return rng.uniform(low, high, x.shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: encoder.create(seed, size))
    return encoder, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small ResNet with a MoCo head as a PyTorch file."""
    encoder, variables = scrambled("resnet8", width=4, hidden=8, dim=16)
    saved = save.state_dict("resnet8", encoder, variables, "moco", with_head=True)
    path = tmp_path_factory.mktemp("files") / "small.pth"
    save.write(path, saved, "moco")
    return path


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "small"
    importing.run(str(file), str(workdir))
    return workdir


# (format, backbone, fields): each format must preserve the backbone and its head.
ROUND_TRIPS = [
    ("timm", "resnet18", dict(stem="small")),
    ("torchvision", "resnet50", dict(width=8)),
    ("moco", "resnet18", {}),
    ("timm", "efficientnet_b0", {}),
    ("torchvision", "efficientnet_b0", {}),
    ("timm", "efficientnet_b0_seed", {}),
    ("moco", "efficientnet_b0_seed", {}),
    ("timm", "mobilenetv2", {}),
    ("torchvision", "mobilenetv2", {}),
    ("timm", "mobilenetv3_large", {}),
    ("torchvision", "mobilenetv3_large_tv", {}),
    ("moco", "mobilenetv3_large_tv", {}),
    ("moco", "mobilenetv3_large_seed", {}),
    ("timm", "vit_tiny_p16", {}),
    ("timm", "xcit_tiny_12_p16", {}),
    ("moco", "xcit_tiny_12_p16", {}),
]


@pytest.mark.parametrize("naming, backbone, fields", ROUND_TRIPS)
def test_state_dicts_come_back_as_they_were(naming, backbone, fields):
    """Compares headless and complete exports; reads headless ones of the smallest networks only."""
    encoder, variables = scrambled(backbone, hidden=24, dim=16, **fields)
    whole, headless = (
        save.state_dict(backbone, encoder, variables, naming, with_head)
        for with_head in (True, False)
    )
    assert {x.dtype.name for x in whole.arrays.values()} <= {"float32", "int64"}
    assert len(whole.arrays) - len(headless.arrays) == 4  # two layers
    for key, array in headless.arrays.items():
        np.testing.assert_array_equal(array, whole.arrays[key])
    read = {("backbone", "head"): whole}
    if backbone.startswith("resnet"):
        read["backbone",] = headless
    for parts, saved in read.items():
        imported = convert.from_mapping(saved.arrays, arch=saved.backbone)
        for part in parts:
            for collection in ("params", "batch_stats"):
                assert_equal(
                    imported.variables[collection].get(part), variables[collection].get(part)
                )
        assert ("head" in parts) == (imported.spec["head"] == "mlp")


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("head", ["swav", "dino", "dino_bn", "mlp_bn", "mlp_unit", "regression"])
def test_heads_come_back_as_they_were(head):
    prototypes = (20,) if head in ("swav", "dino", "dino_bn", "mlp_unit") else ()
    fields = dict(head=head, hidden=24, dim=16, prototypes=prototypes)
    encoder, variables = scrambled("resnet8", width=4, **fields)
    saved = save.state_dict("resnet8", encoder, variables, "moco", with_head=True)
    imported = convert.from_mapping(saved.arrays)
    assert (imported.spec["head"], imported.spec["prototypes"]) == (head, prototypes)
    assert_equal(dict(imported.variables), dict(variables))


def test_an_epsilon_there_changes_the_variances_and_not_the_features():
    encoder, variables = scrambled("mobilenetv3_large", head="none")
    saved = save.state_dict("mobilenetv3_large", encoder, variables, "torchvision")
    assert "-0.00099 was added" in saved.notes[1]
    imported = convert.from_mapping(saved.arrays)
    assert imported.spec["backbone"] == "mobilenetv3_large_tv"
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    exported, original = (
        jax.jit(lambda v, x, e=e: e.apply(v, x, norm="running"))(v, images).features
        for e, v in ((imported.encoder, imported.variables), (encoder, variables))
    )
    assert helpers.relative_error(exported, original) < 1e-5


def test_networks_that_do_not_exist_there_are_refused():
    for backbone, naming, message in (
        ("mobilenetv3_large_seed", "timm", "which has no equal model"),
        ("resnet50_same", "torchvision", "which has no equal model"),
        ("vit_tiny_p16", "detectron2", "detectron2 supports: resnet18"),
        ("resnet18", "keras", "naming='keras' is not known"),
    ):
        encoder = models.backbone(backbone)
        with pytest.raises(UserError, match=message):
            save.state_dict(backbone, encoder, {"params": {}, "batch_stats": {}}, naming)
    encoder, variables = scrambled("resnet8", width=4, adapter=8)
    with pytest.raises(UserError, match="cannot hold a head behind an adapter"):
        save.state_dict("resnet8", encoder, variables, "moco", with_head=True)


@pytest.mark.parametrize("format", ["timm", "moco", "safetensors", "detectron2", "stablehlo"])
def test_every_format_is_written_compared_and_described(run, tmp_path, format, capsys):
    output = tmp_path / f"out{export.FORMATS[format].suffixes[0]}"
    code = main.main(["export", str(run), f"--format={format}", f"--output={output}", "--size=16"])
    assert code == 0 and "largest relative error" in capsys.readouterr().out
    card = (tmp_path / f"{output.name}.md").read_text()
    for part in ("resnet8", "M of 2^20", "[0.485, 0.456, 0.406]", "sha256", "small.pth", "256 px"):
        assert part in card, part
    assert output.stat().st_mode & 0o044  # others may read it
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name, f"{output.name}.md"]


def test_detectron2_reads_its_own_names(run, tmp_path):
    result = export.run(str(run), format="detectron2", output=str(tmp_path / "model.pkl"), size=16)
    content = pickle.loads((tmp_path / "model.pkl").read_bytes())
    assert content["matching_heuristics"] is True and result["errors"]
    model = content["model"]
    assert model["stem.conv1.weight"].shape == (4, 3, 3, 3)
    for key in (
        "stem.conv1.norm.running_var",
        "res2.0.conv2.norm.weight",
        "res3.0.shortcut.weight",
    ):
        assert key in model
    assert not any(key.startswith(("fc", "head")) for key in model)


def test_a_head_is_left_out_unless_it_is_asked_for(run, tmp_path):
    for words, count in (({}, 0), ({"with_head": True}, 4)):
        export.run(str(run), format="moco", output=str(tmp_path / "a.pth"), size=16, **words)
        content = pickles.read(tmp_path / "a.pth")
        keys = [k for k in content["state_dict"] if k.startswith("module.encoder_q.fc")]
        assert len(keys) == count
        assert ("16 wide" in (tmp_path / "a.pth.md").read_text()) == bool(count)


def test_exports_go_beside_the_checkpoint_unless_told_otherwise(run, file):
    assert export.run(str(run), format="timm", size=16)["output"] == str(
        run / "exports" / "resnet8-timm.pth"
    )
    assert export.run(str(file), format="timm", size=16)["output"] == str(
        file.parent / "resnet8-timm.pth"
    )


def test_a_wrong_export_is_removed_again(run, tmp_path, monkeypatch):
    real = save.state_dict

    def wrong(*args):
        saved = real(*args)
        saved.arrays["conv1.weight"] = saved.arrays["conv1.weight"] * 1.01
        return saved

    monkeypatch.setattr(save, "state_dict", wrong)
    with pytest.raises(RuntimeError, match="was not written"):
        export.run(str(run), format="timm", output=str(tmp_path / "new" / "a.pth"), size=16)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_one_before(run, tmp_path, monkeypatch):
    output = tmp_path / "a.pth"
    output.write_bytes(b"before")

    def broken(*_):
        raise UserError("broken")

    for name, error in (("state_dict", UserError), ("write", OSError)):
        monkeypatch.setattr(save, name, broken if name == "state_dict" else full)
        with pytest.raises(error):
            export.run(str(run), format="timm", output=str(output), size=16)
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
        assert output.read_bytes() == b"before"


def test_what_a_killed_export_left_is_removed(run, tmp_path):
    here = export.socket.gethostname()
    killed, running, other = (
        tmp_path / f".unchecked.{host}.{process}"
        for host, process in ((here, 2**22 + 1), (here, os.getpid()), ("elsewhere", 2**22 + 1))
    )
    for folder in (killed, running, other):
        folder.mkdir()
        (folder / "a.pth").write_bytes(b"half")
    export._remove_killed(export.epath.Path(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([running, other])


def full(path, *_):
    path.write_bytes(b"half")
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--format=tim"], "Did you mean 'timm'"),
        (["--format=onnx", "--output=a.pth"], "should end in .onnx"),
        (["--format=timm", "--size=-1"], "is below 0"),
        (["--format=timm", "--network=teacher"], "config.network='teacher' is not known"),
        ([], "--format"),
    ],
)
def test_mistaken_words_are_told(run, words, message, capsys):
    assert main.main(["export", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_told(tmp_path, capsys):
    assert main.main(["export", str(tmp_path / "no"), "--format=timm"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main.main(["export", str(tmp_path), "--format=timm"]) == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path):
    """Five pictures of several formats, one of them damaged."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ("a.png", "b.jpg", "more/c.bmp", "more/d é.webp")
    for i, name in enumerate(names):
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8))
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    damaged = io.BytesIO()
    Image.new("RGB", (64, 64)).save(damaged, "PNG")
    (folder / "b2.png").write_bytes(damaged.getvalue()[:60])
    return folder


def test_features_of_a_folder_are_those_of_its_pictures(run, photos, tmp_path, monkeypatch):
    """Extracts features with the CPU's faster convolutions, which an export does not use."""
    target, shifts, extract = tmp_path / "found.npz", [], embed.features.extract

    def recording_extract(encoder, *rest):
        shifts.append(encoder.compute.shift_and_add)
        return extract(encoder, *rest)

    monkeypatch.setattr(embed.features, "extract", recording_extract)
    result = embed.run(
        str(run), images=str(photos), output=str(target), with_head=True, size=16, batch_size=4
    )
    assert shifts == [True] and not open_model(str(run)).encoder.compute.shift_and_add
    assert result["images"] == 4 and result["unreadable"] == [str(photos / "b2.png")]
    with np.load(target, allow_pickle=False) as stored:
        assert list(stored["files"]) == ["a.png", "b.jpg", "more/c.bmp", "more/d é.webp"]
        opened = open_model(str(run))
        mean, std = (np.array(opened.preprocessing[k], np.float32) for k in ("mean", "std"))
        for i, name in enumerate(stored["files"]):
            pixels = decode.evaluated(decode.decode(photos / name), 16, 18, "bilinear")
            image = ((pixels / np.float32(255) - mean) / std)[None]
            for output in ("features", "embedding"):
                error = helpers.relative_error(stored[output][i], opened(image, output)[0])
                assert error < 1e-5, (name, output)


def test_features_go_into_parquet(run, photos, tmp_path):
    """Writes file names that are not UTF-8, too."""
    parquet = pytest.importorskip("pyarrow.parquet")
    (photos / "b.jpg").rename(photos / "caf\udce9.jpg")
    target = tmp_path / "found.parquet"
    assert main.main(["embed", str(run), f"--images={photos}", f"--output={target}"]) == 0
    table = parquet.read_table(target)
    assert table.column("files").to_pylist()[:2] == ["a.png", r"caf\xe9.jpg"]
    assert len(table.column("features").to_pylist()[0]) == 16


@pytest.mark.parametrize(
    "words, message",
    [
        (["--images={photos}", "--output=a.csv"], "should end in .npz or .parquet"),
        (["--images=nowhere", "--output=a.npz"], "is not a folder"),
        (["--images={photos}/more/empty", "--output=a.npz"], "has no images"),
        (["--images={photos}", "--output=no/a.npz"], "there is no folder"),
        (["--images={photos}", "--output=a.npz", "--batch-size=0"], "is below 1"),
        (["--images={photos}"], "--output"),
    ],
)
def test_what_cannot_be_embedded_is_told(
    run, photos, words, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (photos / "more" / "empty").mkdir()
    assert main.main(["embed", str(run), *(w.format(photos=photos) for w in words)]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_without_pyarrow_the_extra_is_named(run, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"disco-jax\[parquet\]"):
        embed.run(str(run), images=str(photos), output=str(tmp_path / "a.parquet"))
