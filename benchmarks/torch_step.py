"""A step of DisCo on the CPU, ours and the same in PyTorch, in turns.

    python benchmarks/torch_step.py [--size 96] [--batch 8] [--rounds 7]

ResNet-50 teaches ResNet-18 with batch statistics, as the official code does: two views through
student and teacher, one through the momentum network, InfoNCE against 65,536 keys and the squared
distance to the teacher, SGD. Ours augments the images in the step as well; PyTorch's gets them
made. PyTorch runs in a process of its own. Printed: seconds of a step, the medians of the rounds,
and the median of their ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

QUEUE, DIM, HIDDEN, TEMPERATURE, EMA_RATE, WEIGHT = 65_536, 128, 2048, 0.2, 0.999, 32.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.torch:
        return serve(given.size, given.batch)
    command = [sys.executable, __file__, "--torch"]
    command += [f"--size={given.size}", f"--batch={given.batch}"]
    theirs = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ours = disco_jax_step(given.size, given.batch)
    times = []
    for _ in range(given.rounds + 1):
        theirs.stdin.write("step\n")
        theirs.stdin.flush()
        times.append((float(theirs.stdout.readline()), ours()))
    theirs.stdin.close()
    theirs.wait()
    del times[0]  # both compile or allocate
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratio = statistics.median(a / b for a, b in times)
    print(f"PyTorch {medians[0]:.2f} s, ours {medians[1]:.2f} s, ratio {ratio:.2f}")


def disco_jax_step(size: int, batch: int):
    """A function that takes a step of ours and returns its seconds."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np

    from disco_jax import flags
    from disco_jax.plan import program
    from disco_jax.train import state, step

    config = flags.load("disco:student=resnet18,teacher=resnet50")
    config.dtype, config.batch_size, config.augment.size = "float32", batch, size
    config.teacher.update(head="mlp", norm="local")
    built, shapes = program.abstract(config, 1, 100)
    rng = np.random.default_rng(0)

    def filled(x):
        if x.dtype == np.uint8:
            return rng.integers(0, 256, x.shape, np.uint8)
        return (rng.normal(size=x.shape) * 0.03).astype(x.dtype)

    begin, frozen, images = jax.tree.map(filled, shapes)
    current = [state.everywhere(begin)]
    frozen = state.everywhere(frozen)
    images = state.apart(images)
    train_step = step.parallel(built.train_step)

    def one() -> float:
        begin = time.perf_counter()
        current[0], metrics = train_step(current[0], frozen, images)
        jax.block_until_ready((current[0], metrics))
        return time.perf_counter() - begin

    return one


def serve(size: int, batch: int) -> None:
    """A PyTorch step for each line that comes in; its seconds go out."""
    one = torch_step(size, batch)
    for _ in sys.stdin:
        begin = time.perf_counter()
        one()
        print(time.perf_counter() - begin, flush=True)


def torch_step(size: int, batch: int):
    import copy

    import torch
    import torchvision
    from torch.nn import functional

    def network(make, width):
        made = make(num_classes=DIM)
        made.fc = torch.nn.Sequential(
            torch.nn.Linear(width, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, DIM)
        )
        return made.train()

    student = network(torchvision.models.resnet18, 512)
    momentum = copy.deepcopy(student).requires_grad_(False)
    teacher = network(torchvision.models.resnet50, 2048).requires_grad_(False)
    queue = functional.normalize(torch.randn(DIM, QUEUE), dim=0)
    optimizer = torch.optim.SGD(student.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    queries, keys = torch.randn(2, batch, 3, size, size)
    pointer = 0

    def one() -> None:
        nonlocal pointer
        mine = [functional.normalize(student(view), dim=1) for view in (queries, keys)]
        with torch.no_grad():
            pairs = zip(momentum.parameters(), student.parameters(), strict=True)
            for old, new in pairs:
                old.mul_(EMA_RATE).add_(new, alpha=1 - EMA_RATE)
            key = functional.normalize(momentum(keys), dim=1)
            taught = [functional.normalize(teacher(view), dim=1) for view in (queries, keys)]
        own = (mine[0] * key).sum(1, keepdim=True)
        logits = torch.cat([own, mine[0] @ queue.clone()], dim=1) / TEMPERATURE
        loss = functional.cross_entropy(logits, torch.zeros(batch, dtype=torch.long))
        for ours, theirs in zip(mine, taught, strict=True):
            loss = loss + WEIGHT * (ours - theirs).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[:, pointer : pointer + batch] = key.T
        pointer = (pointer + batch) % QUEUE

    return one


if __name__ == "__main__":
    main()
