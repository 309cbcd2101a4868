"""scikit-learn's handwritten digits as a TFDS data set, written once and without a download."""

import os
import pathlib
import shutil
import tempfile

import numpy as np

from disco_jax.data.tensorflow_import import tensorflow
from disco_jax.errors import UserError

NAME, VERSION = "digits", "1.0.0"
TEST_IMAGES = 360  # of 1,797; the other 1,437 are for training
_INFO = "dataset_info.json"


def write(data_dir: str) -> str:
    """Writes the data set to `data_dir` unless it exists; returns its version folder.

    Features: image u8[8, 8, 1] (PNG, values 0..16 scaled to 0..255) and label (10 classes).
    Splits: train and test, stratified by class.

    Raises:
      UserError: scikit-learn is not installed.
    """
    folder = pathlib.Path(data_dir) / NAME / VERSION
    if (folder / _INFO).exists():
        return str(folder)
    arrays = _load()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first, so that dataset_info.json in the final folder implies a
    # complete data set. `mkdtemp` makes a private folder; its subfolder has default permissions.
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=".unfinished_", dir=folder.parent))
    try:
        version_folder = unfinished / VERSION
        version_folder.mkdir()
        _write(str(version_folder), arrays)
        _move(version_folder, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def _move(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves a finished data set to `folder`, unless another process has finished first."""
    if folder.exists() and not (folder / _INFO).exists():
        shutil.rmtree(folder)  # incomplete, from an interrupted process
    try:
        os.replace(source, folder)
    except OSError:
        if not (folder / _INFO).exists():
            raise


def _load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Loads the digits as split -> (images u8[N, 8, 8], labels i64[N])."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError(
            'The digits need scikit-learn: run pip install "disco-jax[demo]".'
        ) from None
    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=TEST_IMAGES, random_state=0, stratify=loaded.target
    )
    return {name: (images[r], loaded.target[r]) for name, r in (("train", train), ("test", test))}


def _write(folder: str, arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes TFRecords and the metadata that `tfds.builder_from_directory` reads."""
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
