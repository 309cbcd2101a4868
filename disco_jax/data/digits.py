"""scikit-learn's handwritten digits, written once as a TFDS data set; nothing is downloaded."""

import os
import pathlib
import shutil
import tempfile

import numpy as np

from disco_jax.data.records import tensorflow
from disco_jax.errors import UserError

NAME, VERSION = "digits", "1.0.0"
TEST_IMAGES = 360  # of 1,797; the other 1,437 are for training
_INFO = "dataset_info.json"


def write(data_dir: str) -> str:
    """Writes the data set below `data_dir` unless it is there; returns its version folder.

    Features: image u8[8, 8, 1] (PNG; the values 0..16 stretched to 0..255) and label (10 classes).
    Splits: train and test, the same share of every class in both.

    Raises:
      UserError: without scikit-learn.
    """
    folder = pathlib.Path(data_dir) / NAME / VERSION
    if (folder / _INFO).exists():
        return str(folder)
    arrays = _load()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first, so that a description in the right folder means a whole data set.
    # Inside the temporary folder, which is private: its child gets the usual permissions.
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished_", dir=folder.parent))
    try:
        made = unfinished / VERSION
        made.mkdir()
        _write(str(made), arrays)
        _move(made, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _move(made: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts a finished data set in its place, unless another process was faster."""
    if folder.exists() and not (folder / _INFO).exists():
        shutil.rmtree(folder)  # left behind half-written
    try:
        os.replace(made, folder)
    except OSError:
        if not (folder / _INFO).exists():
            raise


def _load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> (u8[N, 8, 8], i64[N])."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError('The digits need the extra: pip install "disco-jax[demo]".') from None
    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=TEST_IMAGES, random_state=0, stratify=loaded.target
    )
    return {name: (images[r], loaded.target[r]) for name, r in (("train", train), ("test", test))}


def _write(folder: str, arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """TFRecords and the description that `tfds.builder_from_directory` reads."""
    tf, tfds = tensorflow()
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    splits = []
    for split, (images, labels) in arrays.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=NAME, split=split, filetype_suffix="tfrecord"
        )
        size = 0
        with tf.io.TFRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1))) as f:
            for image, label in zip(images, labels, strict=True):
                example = features.serialize_example(
                    features.encode_example({"image": image[..., None], "label": int(label)})
                )
                f.write(example)
                size += len(example)
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(labels)],
                num_bytes=size,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=splits,
        version=VERSION,
        supervised_keys=("image", "label"),
        description="The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships.",
    )
