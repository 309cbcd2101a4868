"""Multiply-adds as they are published, and latencies that are times."""

import pytest

from disco_jax import models
from disco_jax.evaluate import cost


@pytest.mark.parametrize(
    "name, millions",
    [
        # torchvision publishes them with the last layer of D x 1000, which is not counted here.
        ("resnet50", 4089.2 - 2.0),
        ("mobilenetv2", 300.8 - 1.3),
        ("efficientnet_b0", 385.8 - 1.3),
    ],
)
def test_multiply_adds_are_the_published_ones(name, millions):
    found = cost.multiply_adds(models.backbone(name), 224) / 1e6
    assert found == pytest.approx(millions, rel=0.005)


def test_latency_is_a_time():
    found = cost.latency(models.backbone("resnet8"), 16, repeats=3)
    assert 0 < found["low_ms"] <= found["median_ms"] <= found["high_ms"]
