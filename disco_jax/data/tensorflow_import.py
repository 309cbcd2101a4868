"""Import of TensorFlow, which takes seconds and much memory, at its first use."""

import os


def tensorflow():
    """Imports and returns (tensorflow, tensorflow_datasets), without GPUs and without log lines."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN prints a message on stderr
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.get_logger().setLevel("ERROR")
    tf.config.set_visible_devices([], "GPU")
    return tf, tfds
