"""Baseline for `compiled.py`: a straightforward step, correct, in bfloat16, without optimizations.

Losses use float32 logits [B, K + 1], weights are float32, and the images are all-gathered to be
shuffled. Each image draws the order of its colour operations; all operations are computed at each
position and one is selected. A blur is a sum of 23 shifted images along each axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax import models
from disco_jax.ops import augment
from disco_jax.ops.collectives import gather
from disco_jax.ops.vectors import l2_normalize

TAPS = 11  # of the blur, on each side of a pixel


def turn_off(config: Any) -> None:
    """Switches every optimization of `config.fast` off."""
    config.fast.update(losses=False, half_queue=False, **models.PLAIN)


def replace(parts: dict[str, Any], config: Any) -> None:
    """Replaces components of `compiled.components` by those of the baseline, in place."""
    parts["augmentation"] = parts["augmentation"]._replace(function=_augmentation(config.augment))
    terms = {"contrast": contrast, "similarity": similarity}
    for name in terms.keys() & parts.keys():
        parts[name] = parts[name]._replace(
            function=with_gradient(terms[name], config.objectives[name])
        )


def logits(rows: Array, positives: Array, bank: Array) -> Array:
    """Computes f32[B, K + 1] logits with bfloat16 factors and float32 sums."""
    half = jnp.bfloat16
    negatives = jnp.matmul(
        rows.astype(half), bank.T.astype(half), preferred_element_type=jnp.float32
    )
    return jnp.concatenate([jnp.sum(rows * positives, axis=-1, keepdims=True), negatives], axis=-1)


def contrast(student: Any, targets: Any, memory: Any, settings: Any):
    """Computes InfoNCE of the pairs, its accuracy, and the queues with the new keys."""
    losses, accuracies, queues = [], [], {}
    for query_view, key_view in settings.pairs:
        key = l2_normalize(targets[settings.keys_from][key_view].embedding)
        queue = memory[f"view_{key_view}"]
        similarities = logits(l2_normalize(student[query_view].embedding), key, queue.vectors)
        scaled = similarities / settings.temperature
        losses.append(jnp.mean(jax.nn.logsumexp(scaled, axis=-1) - scaled[:, 0]))
        accuracies.append(jnp.mean(jnp.argmax(similarities, axis=-1) == 0))
        queues[f"view_{key_view}"] = queue.push(gather(key))
    return jnp.mean(jnp.stack(losses)), (queues, accuracies)


def similarity(student: Any, targets: Any, memory: Any, settings: Any):
    """Computes SEED's cross-entropy of two softmaxes, with exact logits of the teacher."""
    losses, queues = [], {}
    for group in settings.groups:
        name = f"view_{group[0][1]}"
        queue = memory[name]
        for view, teacher_view in group:
            teacher = l2_normalize(targets["teacher"][teacher_view].embedding)
            exact = jnp.concatenate(
                [
                    jnp.sum(teacher * teacher, axis=-1, keepdims=True),
                    jnp.matmul(teacher, queue.vectors.T, precision="highest"),
                ],
                axis=-1,
            )
            probabilities = jax.nn.softmax(exact / settings.teacher_temperature, axis=-1)
            scores = logits(l2_normalize(student[view].embedding), teacher, queue.vectors)
            scores = jax.nn.log_softmax(scores / settings.student_temperature, axis=-1)
            losses.append(-jnp.mean(jnp.sum(probabilities * scores, axis=-1)) / len(group))
        first = l2_normalize(targets["teacher"][group[0][1]].embedding)
        queues[name] = queue.push(gather(first))
    return sum(losses), queues


def with_gradient(term, settings):
    """Builds a part's function (student, targets, memory) -> loss, memory and gradient."""

    def part(student, targets, memory):
        def loss(student):
            return term(student, targets, memory, settings)

        return jax.value_and_grad(loss, has_aux=True)(student)

    return part


def _augmentation(settings: Any):
    def augmentation(crops, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        return {
            view: photometric(images, jax.random.fold_in(key, view), settings)
            for view, images in crops.items()
        }

    return augmentation


def photometric(crops: Array, key: Array, settings: Any) -> Array:
    """Applies MoCo-v2's operations one by one, u8[B, H, W, 3] -> f32[B, H, W, 3]."""
    count = len(crops)
    jitter_key, order_key, grey_key, blur_key, sigma_key, flip_key, act_key = jax.random.split(
        key, 7
    )
    images = crops.astype(jnp.float32) / 255
    strengths = jnp.asarray(settings.jitter)[None]
    spread = jax.random.uniform(jitter_key, (count, 4), minval=-1.0) * strengths
    factors = spread + jnp.array([[1.0, 1.0, 1.0, 0.0]])
    orders = jax.vmap(lambda k: jax.random.permutation(k, 4))(jax.random.split(order_key, count))
    jittered = _jitter(images, factors, orders)
    images = _where(jax.random.uniform(act_key, (count,)) < settings.jitter_prob, jittered, images)
    grey = jax.random.uniform(grey_key, (count,)) < settings.grey_prob
    images = augment.grayscale(images, grey)
    low, high = settings.blur_sigma
    sigma = jax.random.uniform(sigma_key, (count,), minval=low, maxval=high)
    blurred = _blur(_blur(images, sigma, 1), sigma, 2)
    images = _where(jax.random.uniform(blur_key, (count,)) < settings.blur_prob, blurred, images)
    mirrored = jax.random.uniform(flip_key, (count,)) < settings.flip_prob
    images = _where(mirrored, images[:, :, ::-1], images)
    return augment.normalize(images, tuple(settings.mean), tuple(settings.std))


def _jitter(images: Array, factors: Array, orders: Array) -> Array:
    operations = [getattr(augment, name) for name in augment.JITTER]
    for position in range(4):
        results = [operation(images, factors[:, i]) for i, operation in enumerate(operations)]
        for i, image in enumerate(results):
            images = _where(orders[:, position] == i, image, images)
    return images


def _blur(images: Array, sigma: Array, axis: int) -> Array:
    offsets = jnp.arange(-TAPS, TAPS + 1, dtype=jnp.float32)[None]
    weights = jnp.exp(-0.5 * jnp.square(offsets / sigma[:, None]))
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    padding = [(TAPS, TAPS) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(images, padding, mode="reflect")
    size = images.shape[axis]
    shifted = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(2 * TAPS + 1))
    return sum(weights[:, i, None, None, None] * part for i, part in enumerate(shifted))


def _where(mask: Array, images: Array, others: Array) -> Array:
    return jnp.where(mask[:, None, None, None], images, others)
