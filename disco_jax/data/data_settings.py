"""Settings of images, views and bags: sections of a pretraining config."""

import dataclasses

from disco_jax import typed
from disco_jax.data import views
from disco_jax.data.views import Crop, Photometric


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Images of a run, the section `config.data`.

    Attributes:
      source: tfds | folder | npz
      name: TFDS name of the data set; for other sources, its name in tables
      dir: "": $TFDS_DATA_DIR or ~/tensorflow_datasets. Otherwise a folder of images or .tar
        archives, a glob pattern of image files, a list of files, or an .npz file.
      train_split: split that training reads
      eval_split: split that evaluations read
      eval_resize: shorter side in px before evaluations crop the centre; 0: resize straight to the
        size
      eval_interpolation: filter of that resize: bilinear | bicubic; "": augment.interpolation, as
        for the crops
      subset: a text file with one file name a line: training reads only these images
      shuffle_buffer: encoded records in the shuffle buffer of TFRecord files
      cache: keep encoded records in memory; small data sets are always kept
      splits: Assigns splits explicitly: split=folder, as in "train=Training set,test=Holdout",
        where the right side is a folder, a pattern inside data.dir, a list, or "." for everything.
        "": the names of the folders decide.
      labels: a file with lines "FILE,CLASS" (comma or tab) for images without labels
      range: Pixel values that map to 0..255 for images with more than 8 bits a channel: full (all
        16 bits) | image (from each image's minimum to its maximum) | two numbers, as in "0,4095".
      max_pixels: images with more pixels count as unreadable
      max_unreadable: unreadable images that a run may skip whatever the data set's size
      max_unreadable_percent: the same in percent of the images; the larger limit applies
    """

    source: str = "tfds"
    name: str = ""
    dir: str = ""
    train_split: str = "train"
    eval_split: str = "validation"
    eval_resize: int = 256
    eval_interpolation: str = ""
    subset: str = ""
    shuffle_buffer: int = 16_384
    cache: bool = False
    splits: str = ""
    labels: str = ""
    range: str = "full"
    max_pixels: int = 178_956_970
    max_unreadable: int = 10
    max_unreadable_percent: float = 1.0


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Crop, Photometric):
    """Crop and photometric operations of global views, the section `config.augment`.

    The fields in `views.PER_VIEW` may be tuples with a number for each global view. `presets.py`
    has their values.
    """

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Per-channel mean and standard deviation."""
        return self.mean, self.std


@dataclasses.dataclass(frozen=True)
class LocalSettings:
    """Settings in which local views differ from global ones, the section `config.local`.

    `presets.py` has their values.

    Attributes:
      count: number of local views.
      size: see `Crop`.
      scale: see `Crop`.
      blur_prob: see `Photometric`.
      solarize_prob: see `Photometric`.
    """

    count: int
    size: int
    scale: tuple[float, float]
    blur_prob: float
    solarize_prob: float


@dataclasses.dataclass(frozen=True)
class BagSettings:
    """Groups of similar images, the section `config.bags`.

    Attributes:
      file: output of `disco-jax bags`; "": none
      sampling: images | clusters (each cluster equally often)
    """

    file: str = ""
    sampling: str = "images"


def build_views(
    augment: AugmentSettings, count: int = 2, local: LocalSettings | None = None
) -> views.Recipe:
    """Builds the recipe of global and local views; see `views.build`."""
    changes = None if local is None else typed.values(local)
    return views.build(typed.values(augment), count, changes)
