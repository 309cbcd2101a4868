"""A step of DisCo or SEED, ours and the same in PyTorch, in turns on one machine.

    python benchmarks/torch_step.py [--method disco] [--student resnet18] [--size 96] [--batch 8]
        [--rounds 7] [--plain]
    python benchmarks/torch_step.py --device gpu --half --size 224 --batch 256 --peak 989

ResNet-50 teaches ResNet-18, or what --student says, as in the official code. DisCo: two views
through student and teacher (on batch statistics), one through the momentum network, InfoNCE
against 65,536 keys and the squared distance to the teacher. SEED: one view through student and
teacher (on stored statistics), the cross-entropy of their similarities to 65,536 embeddings. SGD.
Ours augments the images in the step as well; PyTorch's gets them made. With `--half` ours computes
in bfloat16, PyTorch under its autocast to bfloat16 with channels last and each network compiled;
with `--plain` ours keeps XLA's own convolutions and max-pool (fast.shifts=off).

PyTorch runs in a process of its own, on the same device: of several GPUs, set one by
CUDA_VISIBLE_DEVICES. Printed: seconds of a step, the medians of the rounds, images a second, the
median of the ratios, and with `--peak` the share of so many TFLOP/s of the operations of the
networks (2 a multiply-add, a gradient counted as two forward passes).
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time

QUEUE, DIM, HIDDEN, EMA_RATE, WEIGHT = 65_536, 128, 2048, 0.999, 32.0
STUDENTS = {  # -> torchvision's name
    "resnet18": "resnet18",
    "efficientnet_b0": "efficientnet_b0",
    "mobilenetv2": "mobilenet_v2",
    "mobilenetv3_large": "mobilenet_v3_large",
}
WARM, COLD = 0.2, 0.01  # temperatures; the second is of SEED's teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("disco", "seed"), default="disco")
    parser.add_argument("--student", choices=STUDENTS, default="resnet18")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plain", action="store_true", help="ours with fast.shifts=off")
    parser.add_argument("--peak", type=float, default=0, help="TFLOP/s of the device")
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.torch:
        return serve(given)
    command = [sys.executable, __file__, "--torch", *sys.argv[1:]]
    theirs = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ours, operations = disco_jax_step(given)
    times = []
    for _ in range(given.rounds + 2):
        theirs.stdin.write("step\n")
        theirs.stdin.flush()
        times.append((float(theirs.stdout.readline()), ours()))
    theirs.stdin.close()
    theirs.wait()
    report(times[2:], operations, given)  # in the first two both compile or allocate


def report(times: list[tuple[float, float]], operations: float, given) -> None:
    for name, column in zip(("PyTorch", "ours"), zip(*times, strict=True), strict=True):
        seconds = statistics.median(column)
        share = operations * given.batch / seconds / 1e12 / given.peak if given.peak else None
        told = "" if share is None else f", {100 * share:.1f} % of the peak"
        print(f"{name}: {seconds:.4g} s, {given.batch / seconds:.4g} images/s{told}")
    print(f"ratio {statistics.median(theirs / ours for theirs, ours in times):.2f}")


def disco_jax_step(given):
    """A function that takes a step of ours and returns its seconds; operations an image."""
    if given.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is there too
    import jax
    import numpy as np

    from disco_jax import flags
    from disco_jax.plan import program
    from disco_jax.train import state, step

    if jax.default_backend() != given.device:
        sys.exit(f"--device={given.device}, but JAX computes on {jax.default_backend()}.")
    config = flags.load(f"{given.method}:student={given.student},teacher=resnet50")
    config.dtype = "bfloat16" if given.half else "float32"
    config.batch_size, config.augment.size = given.batch, given.size
    config.student.hidden = HIDDEN
    if given.plain:
        config.fast.shifts = "off"
    norm = "local" if given.method == "disco" else "running"
    config.teacher.update(head="mlp", hidden=HIDDEN, norm=norm)
    built, shapes = program.abstract(config, 1, 100)
    rng = np.random.default_rng(0)

    def filled(x):
        if x.dtype == np.uint8:
            return rng.integers(0, 256, x.shape, np.uint8)
        return np.abs(rng.normal(size=x.shape) * 0.03).astype(x.dtype)

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

    return one, operations_of(built.learner.method, given.size)


def operations_of(method, size: int) -> float:
    """Of the networks, an image."""
    from disco_jax.evaluate.cost import multiply_adds

    passes = {
        name: len(views) * (3 if name == "student" else 1) for name, views in method.plan.items()
    }
    return sum(
        2 * count * multiply_adds(method.networks[name].encoder, size)
        for name, count in passes.items()
    )


def serve(given) -> None:
    """A PyTorch step for each line that comes in; its seconds go out."""
    import torch

    torch.set_float32_matmul_precision("highest")
    device = "cuda" if given.device == "gpu" else "cpu"
    one = torch_step(given, torch.device(device))
    for _ in sys.stdin:
        begin = time.perf_counter()
        one()
        if device == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - begin, flush=True)


def torch_step(given, device):
    """A function that takes a step of the same method in PyTorch."""
    import copy

    import torch
    import torchvision

    def network(name):
        made = torchvision.models.get_model(name, num_classes=DIM)
        for module in made.modules():  # as ours, which leaves out what these networks drop
            if isinstance(module, torch.nn.Dropout | torchvision.ops.StochasticDepth):
                module.p = 0.0
        last = made.fc if hasattr(made, "fc") else made.classifier[-1]
        head = torch.nn.Sequential(
            torch.nn.Linear(last.in_features, HIDDEN),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, DIM),
        )
        if hasattr(made, "fc"):
            made.fc = head
        else:
            made.classifier[-1] = head
        layout = torch.channels_last if given.half else torch.contiguous_format
        return made.train().to(device, memory_format=layout)

    student = network(STUDENTS[given.student])
    networks = {
        "student": student,
        "momentum": copy.deepcopy(student).requires_grad_(False),
        "teacher": network("resnet50").requires_grad_(False),
    }
    if given.method == "seed":
        networks["teacher"].eval()
    if given.half:
        for made in networks.values():
            made.compile()
    optimizer = torch.optim.SGD(student.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    queue = torch.nn.functional.normalize(torch.randn(DIM, QUEUE, device=device), dim=0)
    images = torch.randn(2, given.batch, 3, given.size, given.size, device=device)
    if given.half:
        images = [view.contiguous(memory_format=torch.channels_last) for view in images]
    loss_of = {"disco": disco_loss, "seed": seed_loss}[given.method]
    pointer = 0

    def one() -> None:
        nonlocal pointer
        precision = torch.autocast(device.type, torch.bfloat16) if given.half else None
        with precision or contextlib.nullcontext():
            loss, pushed = loss_of(networks, images, queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[:, pointer : pointer + given.batch] = pushed.T
        pointer = (pointer + given.batch) % QUEUE

    return one


def disco_loss(networks, images, queue):
    """The loss, and the embeddings that enter the queue."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    mine = [normalize(networks["student"](view), dim=1) for view in images]
    with torch.no_grad():
        old, new = (list(networks[name].parameters()) for name in ("momentum", "student"))
        torch._foreach_lerp_(old, new, 1 - EMA_RATE)
        key = normalize(networks["momentum"](images[1]), dim=1)
        taught = [normalize(networks["teacher"](view), dim=1) for view in images]
    own = (mine[0] * key).sum(1, keepdim=True)
    logits = torch.cat([own, mine[0] @ queue.clone()], dim=1) / WARM
    loss = cross_entropy(logits, torch.zeros(len(key), dtype=torch.long, device=key.device))
    for ours, theirs in zip(mine, taught, strict=True):
        loss = loss + WEIGHT * (ours - theirs).square().sum(1).mean()
    return loss, key


def seed_loss(networks, images, queue):
    """See `disco_loss`; the teacher's similarities are float32, as at its temperature they must."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    mine = normalize(networks["student"](images[0]), dim=1)
    with torch.no_grad(), torch.autocast(mine.device.type, enabled=False):
        with torch.autocast(mine.device.type, torch.bfloat16, enabled=mine.dtype != torch.float32):
            raw = networks["teacher"](images[0])
        teacher = normalize(raw.float(), dim=1)
        exact = torch.cat([(teacher * teacher).sum(1, keepdim=True), teacher @ queue], dim=1)
        shares = torch.softmax(exact / COLD, dim=1)
    own = (mine * teacher).sum(1, keepdim=True)
    return cross_entropy(torch.cat([own, mine @ queue.clone()], dim=1) / WARM, shares), teacher


if __name__ == "__main__":
    main()
