"""Bags: the members drawn for an image, and batches that resume and shard like other sources."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from disco_jax.data.arrays import ArraySource
from disco_jax.data.bags import Bags, BagSource
from disco_jax.data.contract import Position
from disco_jax.data.views import Crop
from disco_jax.errors import UserError

WHOLE = Crop(4, (1.0, 1.0), (1.0, 1.0), "bilinear", True)
VIEWS = {0: WHOLE, 1: WHOLE, 2: WHOLE, 3: WHOLE}
COUNT = 12


def images():
    """Makes images; record i is grey with value 10 i."""
    return (
        np.arange(COUNT, dtype=np.uint8)[:, None, None]
        * np.uint8(10)
        * np.ones((1, 4, 4), np.uint8)
    )


def neighbours():
    """Makes bags in which record i has the neighbours i + 1 and i + 2."""
    return Bags(neighbours=(np.arange(COUNT)[:, None] + [[1, 2]]).astype(np.int32) % COUNT)


CLUSTERS = np.array([0] * 8 + [2] * 3 + [3], np.int32)  # cluster 1 is empty, 3 has one record


def batches(source, count, start=None, **kwargs):
    arguments = dict(split="train", views=VIEWS, batch_size=4, seed=0, max_unreadable=0)
    start = start or Position.start()
    return list(itertools.islice(source.train(**{**arguments, **kwargs}, start=start), count))


def records(view):
    return view[:, 0, 0, 0] // 10


def wrapped(bags, hosts=(0, 1), **kwargs):
    source = ArraySource({"train": (images(), None)})
    return BagSource(source, bags, (2, 3), process_index=hosts[0], process_count=hosts[1], **kwargs)


def test_two_views_are_of_the_image_and_two_of_a_neighbour():
    source, anchors, steps = wrapped(neighbours()), set(), set()
    for batch in batches(source, 9):
        anchor, other = records(batch.views[0]), records(batch.views[2])
        np.testing.assert_array_equal(anchor, records(batch.views[1]))
        np.testing.assert_array_equal(other, records(batch.views[3]))
        steps |= set((other.astype(int) - anchor) % COUNT)
        anchors |= set(anchor.tolist())
        assert batch.aux == {}
    assert steps == {1, 2} and anchors == set(range(COUNT))  # every image, both neighbours
    assert source.count("train") == COUNT and source.splits == ["train"]


def test_an_epoch_shows_every_image_once_and_resumes_anywhere():
    all_ = batches(wrapped(neighbours()), 7)
    assert sorted(np.concatenate([records(b.views[0]) for b in all_[:3]])) == list(range(COUNT))
    assert all_[2].position == Position(1, 0)
    for i in (0, 1, 2, 4):
        resumed = batches(wrapped(neighbours()), 2, start=all_[i].position)
        for batch, expected in zip(resumed, all_[i + 1 :], strict=False):
            for view in VIEWS:
                np.testing.assert_array_equal(batch.views[view], expected.views[view])
    other = batches(wrapped(neighbours()), 3, seed=1)
    assert any((records(a.views[0]) != records(b.views[0])).any()
               for a, b in zip(all_, other, strict=False))  # fmt: skip


def test_hosts_share_an_epoch():
    shares = [
        np.concatenate([records(b.views[0]) for b in batches(
            wrapped(neighbours(), (host, 3)), 2, batch_size=2)])
        for host in range(3)
    ]  # fmt: skip
    assert sorted(np.concatenate(shares)) == list(range(COUNT))


def test_another_of_a_cluster_is_never_the_image_itself_unless_it_is_alone():
    bags = Bags(clusters=CLUSTERS)
    everyone = np.arange(COUNT)
    drawn = np.stack([bags.members(everyone, np.full(COUNT, c)) for c in np.linspace(0, 0.999, 50)])
    assert (CLUSTERS[drawn] == CLUSTERS).all()
    assert (drawn[:, :11] != everyone[:11]).all() and (drawn[:, 11] == 11).all()
    for record in everyone[:11]:
        assert len(set(drawn[:, record])) == (CLUSTERS[record] == CLUSTERS).sum() - 1


def test_clusters_are_sampled_evenly_and_labelled():
    source = wrapped(Bags(clusters=CLUSTERS), sampling="clusters")
    batches_read = batches(source, 300)
    for batch in batches_read:
        np.testing.assert_array_equal(batch.aux["cluster"], CLUSTERS[records(batch.views[0])])
    labels = np.concatenate([batch.aux["cluster"] for batch in batches_read])
    shares = np.bincount(labels, minlength=4) / len(labels)
    np.testing.assert_allclose(shares, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.05)


def test_encoded_pictures_are_decoded_and_the_unreadable_skipped():
    source = ArraySource({"train": (images(), None)})

    def encoded(split, rows):
        for row in rows:
            file = io.BytesIO()
            Image.fromarray(images()[row]).save(file, "PNG")
            yield f"picture {row}", b"broken" if row == 5 else file.getvalue(), -1

    source.take = encoded
    batches_read = batches(BagSource(source, neighbours(), (2, 3)), 6, max_unreadable=1)
    shown = {
        r for batch in batches_read for view in (0, 2) for r in records(batch.views[view]).tolist()
    }
    assert shown == set(range(COUNT)) - {5} and source.unreadable == ["picture 5"]
    with pytest.raises(UserError, match="1 records of arrays cannot be decoded"):
        batches(BagSource(source, neighbours(), (2, 3)), 6, max_unreadable=0)


def test_files_come_back_and_others_are_refused(tmp_path):
    for bags in (neighbours(), Bags(clusters=CLUSTERS)):
        with open(tmp_path / "bags.npz", "wb") as file:
            bags.save(file)
        again = Bags.load(str(tmp_path / "bags.npz"))
        np.testing.assert_array_equal(again.neighbours, bags.neighbours)
        np.testing.assert_array_equal(again.clusters, bags.clusters)
    with pytest.raises(UserError, match="disco-jax bags"):
        Bags.load(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no bags")
    with pytest.raises(UserError, match="does not hold bags"):
        Bags.load(str(tmp_path / "text.npz"))


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="bags of 3 images, but split 'train' of arrays has 12"):
        batches(wrapped(Bags(clusters=CLUSTERS[:3])), 1)
    with pytest.raises(UserError, match="holds neighbours"):
        wrapped(neighbours(), sampling="clusters")
    with pytest.raises(UserError, match="Did you mean 'clusters'"):
        wrapped(neighbours(), sampling="cluster")
