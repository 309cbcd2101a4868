"""Writes Fashion-MNIST in colour: every image is blended with a patch of a photograph.

    disco-jax data fashion_mnist --npz fashion.npz
    python -m disco_jax.configs.miniature.fashion_photos fashion.npz fashion_photos.npz

As in MNIST-M (arXiv:1505.07818), a pixel is |patch - image| in each channel, for a patch at a
random place. MNIST-M cuts its patches from BSDS500; here they come from the two photographs that
scikit-learn ships (extra `demo`), so that nothing is downloaded. Training and test images draw
their patches from the same distribution, independently of the labels. The result depends on the
grey images and the seed alone.

Licences: Fashion-MNIST, MIT (Zalando SE); china.jpg, CC BY 2.0 (danielbuechele on flickr.com);
flower.jpg, CC BY 2.0 (vultilion on flickr.com).
"""

import argparse
from collections.abc import Sequence

import numpy as np

from disco_jax.data.arrays import ArraySource
from disco_jax.errors import UserError
from disco_jax.files import whole, write_arrays


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command of the module's docstring; prints counts and checksums.

    Args:
      argv: the arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(description="Writes Fashion-MNIST in colour.")
    parser.add_argument("grey", help="an .npz file from `disco-jax data fashion_mnist --npz FILE`")
    parser.add_argument("colour", help="the .npz file to write")
    parser.add_argument("--seed", type=int, default=0, help="determines the patches; 0 or more")
    values = parser.parse_args(argv)
    if values.seed < 0:
        parser.error(f"--seed={values.seed} must be 0 or more")
    try:
        source = write(values.grey, values.colour, values.seed)
    except UserError as error:
        parser.error(str(error))
    for split in source.splits:
        facts = source.fingerprint(split).items()
        print(f"{split}: {', '.join(f'{name} {value}' for name, value in facts)}")


def write(grey: str, colour: str, seed: int = 0) -> ArraySource:
    """Writes the blended images and the labels of all splits to an .npz file.

    Args:
      grey: an .npz file of grey images, see `ArraySource.from_npz`.
      colour: the file to write.
      seed: determines the patches, 0 or more.

    Returns:
      The written images.

    Raises:
      UserError: `grey` cannot be read, or contains images in colour or larger than the photographs.
    """
    source = ArraySource.from_npz(grey)
    photographs = load_photographs()
    arrays = {}
    for number, split in enumerate(source.splits):
        records = list(source.iter_images(split))
        images = np.stack([image for _, image, _ in records])
        if images.ndim != 3:
            raise UserError(
                f"{grey}: the images of {split} have the shape {images.shape[1:]}, "
                "but only grey images are blended."
            )
        arrays[f"{split}_images"] = blend(images, photographs, np.random.PCG64((seed, number)))
        arrays[f"{split}_labels"] = np.array([label for *_, label in records], np.int32)
    with whole(colour) as unfinished, unfinished.open("wb") as file:
        write_arrays(file, arrays, compress=True)
    return ArraySource.from_npz(colour)


def blend(
    images: np.ndarray, photographs: Sequence[np.ndarray], bits: np.random.BitGenerator
) -> np.ndarray:
    """Computes |patch - image| for every image, with a patch at a random place of a photograph.

    Args:
      images: u8[N, H, W].
      photographs: u8[height, width, 3] each, at least as large as the images.
      bits: random bits; three numbers per image select photograph, top and left edge.

    Returns:
      u8[N, H, W, 3].

    Raises:
      UserError: the images are larger than a photograph.
    """
    count, height, width = images.shape
    if any(photo.shape[0] < height or photo.shape[1] < width for photo in photographs):
        raise UserError(f"Images of {height} x {width} px are larger than a photograph.")
    blended = np.empty((count, height, width, 3), np.uint8)
    draws = np.random.Generator(bits).random((count, 3))
    for i, (which, down, right) in enumerate(draws):
        photo = photographs[int(which * len(photographs))]
        y = int(down * (photo.shape[0] - height + 1))
        x = int(right * (photo.shape[1] - width + 1))
        patch = photo[y : y + height, x : x + width].astype(np.int16)
        blended[i] = np.abs(patch - images[i, :, :, None])
    return blended


def load_photographs() -> list[np.ndarray]:
    """Returns scikit-learn's china.jpg and flower.jpg, u8[427, 640, 3] each.

    Raises:
      UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError(
            'The photographs need scikit-learn: pip install "disco-jax[demo]".'
        ) from error
    return load_sample_images().images


if __name__ == "__main__":
    main()
