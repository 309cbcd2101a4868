"""Prepared TFDS data sets for tests, in TFRecord and array_record files."""

import contextlib
import io
import pathlib

import numpy as np
from PIL import Image

from disco_jax.data import sources

SHAPES = ((40, 56), (56, 40), (33, 47))


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def write(data_dir, name, records, *, shape=(None, None, 3), files=1, classes=10, kind="tfrecord"):
    """Writes a data set in the layout of `tfds build`; records is {split: [(bytes, label)]}.

    Record i of a split has the file name "i.jpg".
    """
    _, tfds = sources.tensorflow()
    folder = pathlib.Path(data_dir) / name / "1.0.0"
    folder.mkdir(parents=True)
    fields = {"image": tfds.features.Image(shape=shape), "file_name": tfds.features.Text()}
    if classes:
        fields["label"] = tfds.features.ClassLabel(num_classes=classes)
    features = tfds.features.FeaturesDict(fields)
    infos = [
        write_split(folder, name, split, examples, features, files, bool(classes), "tfrecord")
        for split, examples in records.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, version="1.0.0"
    )
    if kind != "tfrecord":  # TFDS computes the metadata from TFRecord files only
        for file in folder.glob("*tfrecord*"):
            file.unlink()
        for split, examples in records.items():
            write_split(folder, name, split, examples, features, files, bool(classes), kind)
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace("tfrecord", kind))
    return folder


def write_split(folder, name, split, examples, features, files, labelled, kind):
    """Writes the files of one split and returns their TFDS `SplitInfo`."""
    _, tfds = sources.tensorflow()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix=kind
    )
    lengths, size = [], 0
    for i in range(files):
        begin, end = (len(examples) * n // files for n in (i, i + 1))
        lengths.append(end - begin)
        path = template.sharded_filepath(shard_index=i, num_shards=files)
        with writer(kind, str(path)) as out:
            for number, (encoded, label) in enumerate(examples[begin:end], begin):
                example = {"image": io.BytesIO(encoded), "file_name": f"{number}.jpg"}
                if labelled:
                    example["label"] = label
                out.write(features.serialize_example(features.encode_example(example)))
                size += len(encoded)
    return tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
    )


def writer(kind, path):
    if kind == "tfrecord":
        return sources.tensorflow()[0].io.TFRecordWriter(path)
    from array_record.python import array_record_module

    return contextlib.closing(array_record_module.ArrayRecordWriter(path, "group_size:1"))


def plain(i, shape=SHAPES[0]):
    """Encodes an image of one grey level that identifies its record."""
    return encode(np.full((*shape, 3), 5 * i, np.uint8), quality=95)


def numbers(images):
    """Returns the records of crops of `plain` images."""
    return np.rint(images[:, 2, 2, 0] / 5).astype(int).tolist()
