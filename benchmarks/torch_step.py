"""A step of DisCo or SEED in this package and in PyTorch, in turns on one machine.

    python benchmarks/torch_step.py [--method disco] [--student resnet18] [--size 96] [--batch 8]
        [--rounds 7] [--plain]
    python benchmarks/torch_step.py --device gpu --half --size 224 --batch 256 --peak 989

The teacher is a ResNet-50, the student a ResNet-18 or --student, as in the official code. DisCo:
two views through student and teacher (with batch statistics), one through the momentum network,
InfoNCE against 65,536 keys and the squared distance to the teacher. SEED: one view through student
and teacher (with stored statistics), the cross-entropy of their similarities to 65,536 embeddings.
The optimizer is SGD. Our step includes the augmentation; PyTorch gets augmented images. With
`--half` ours computes in bfloat16, PyTorch with autocast to bfloat16, channels last and compiled
networks; with `--plain` ours uses XLA's own convolutions and max-pool (fast.shifts=off).

PyTorch runs in a separate process on the same device; select one of several GPUs with
CUDA_VISIBLE_DEVICES. Prints median seconds of a step, images per second, the median ratio, and with
`--peak` the achieved percentage of that many TFLOP/s, counting only operations of the networks (2
per multiply-add, a gradient as two forward passes).
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
WARM, COLD = 0.2, 0.01  # temperatures; the second is for SEED's teacher


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
    parser.add_argument("--peak", type=float, default=0, help="peak TFLOP/s of the device")
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch:
        return serve(args)
    command = [sys.executable, __file__, "--torch", *sys.argv[1:]]
    torch_process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    our_step, operations = disco_jax_step(args)
    times = []
    for _ in range(args.rounds + 2):
        torch_process.stdin.write("step\n")
        torch_process.stdin.flush()
        times.append((float(torch_process.stdout.readline()), our_step()))
    torch_process.stdin.close()
    torch_process.wait()
    report(times[2:], operations, args)  # the first two compile and allocate


def report(times: list[tuple[float, float]], operations: float, args) -> None:
    for name, column in zip(("PyTorch", "ours"), zip(*times, strict=True), strict=True):
        seconds = statistics.median(column)
        utilization = operations * args.batch / seconds / 1e12 / args.peak if args.peak else None
        suffix = "" if utilization is None else f", {100 * utilization:.1f} % of the peak"
        print(f"{name}: {seconds:.4g} s, {args.batch / seconds:.4g} images/s{suffix}")
    print(f"ratio {statistics.median(torch_s / our_s for torch_s, our_s in times):.2f}")


def disco_jax_step(args):
    """Returns a function that runs our step and returns its seconds, and operations per image."""
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the device
    import jax
    import numpy as np

    from disco_jax import flags
    from disco_jax.plan import program
    from disco_jax.train import state, step
    from disco_jax.train.experiment import assemble

    if jax.default_backend() != args.device:
        sys.exit(f"--device={args.device}, but JAX uses {jax.default_backend()}.")
    config = flags.load(f"{args.method}:student={args.student},teacher=resnet50")
    config.dtype = "bfloat16" if args.half else "float32"
    config.batch_size, config.augment.size = args.batch, args.size
    config.student.hidden = HIDDEN
    if args.plain:
        config.fast.shifts = "off"
    norm = "local" if args.method == "disco" else "running"
    config.teacher.update(head="mlp", hidden=HIDDEN, norm=norm)
    built, shapes = program.abstract(assemble(config, steps_per_epoch=100), 1)
    rng = np.random.default_rng(0)

    def filled(x):
        if x.dtype == np.uint8:
            return rng.integers(0, 256, x.shape, np.uint8)
        return np.abs(rng.normal(size=x.shape) * 0.03).astype(x.dtype)

    begin, frozen, images = jax.tree.map(filled, shapes)
    current = [state.replicate(begin)]
    frozen = state.replicate(frozen)
    images = state.shard_batch(images)
    train_step = step.parallel(built.train_step)

    def timed_step() -> float:
        begin = time.perf_counter()
        current[0], metrics = train_step(current[0], frozen, images)
        jax.block_until_ready((current[0], metrics))
        return time.perf_counter() - begin

    return timed_step, operations_of(built.learner.method, args.size)


def operations_of(method, size: int) -> float:
    """Counts the operations of the networks per image."""
    from disco_jax.evaluate.cost import multiply_adds

    passes = {
        name: len(views) * (3 if name == "student" else 1) for name, views in method.plan.items()
    }
    return sum(
        2 * count * multiply_adds(method.networks[name].encoder, size)
        for name, count in passes.items()
    )


def serve(args) -> None:
    """Runs a PyTorch step for each line of the standard input; prints its seconds."""
    import torch

    torch.set_float32_matmul_precision("highest")
    device = "cuda" if args.device == "gpu" else "cpu"
    run_step = torch_step(args, torch.device(device))
    for _ in sys.stdin:
        begin = time.perf_counter()
        run_step()
        if device == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - begin, flush=True)


def torch_step(args, device):
    """Returns a function that runs a step of the same method in PyTorch."""
    import copy

    import torch
    import torchvision

    def network(name):
        model = torchvision.models.get_model(name, num_classes=DIM)
        for module in model.modules():  # our networks have no dropout
            if isinstance(module, torch.nn.Dropout | torchvision.ops.StochasticDepth):
                module.p = 0.0
        last = model.fc if hasattr(model, "fc") else model.classifier[-1]
        head = torch.nn.Sequential(
            torch.nn.Linear(last.in_features, HIDDEN),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, DIM),
        )
        if hasattr(model, "fc"):
            model.fc = head
        else:
            model.classifier[-1] = head
        layout = torch.channels_last if args.half else torch.contiguous_format
        return model.train().to(device, memory_format=layout)

    student = network(STUDENTS[args.student])
    networks = {
        "student": student,
        "momentum": copy.deepcopy(student).requires_grad_(False),
        "teacher": network("resnet50").requires_grad_(False),
    }
    if args.method == "seed":
        networks["teacher"].eval()
    if args.half:
        for model in networks.values():
            model.compile()
    optimizer = torch.optim.SGD(student.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    queue = torch.nn.functional.normalize(torch.randn(DIM, QUEUE, device=device), dim=0)
    images = torch.randn(2, args.batch, 3, args.size, args.size, device=device)
    if args.half:
        images = [view.contiguous(memory_format=torch.channels_last) for view in images]
    loss_of = {"disco": disco_loss, "seed": seed_loss}[args.method]
    pointer = 0

    def run_step() -> None:
        nonlocal pointer
        precision = torch.autocast(device.type, torch.bfloat16) if args.half else None
        with precision or contextlib.nullcontext():
            loss, new_keys = loss_of(networks, images, queue)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue[:, pointer : pointer + args.batch] = new_keys.T
        pointer = (pointer + args.batch) % QUEUE

    return run_step


def disco_loss(networks, images, queue):
    """Returns the loss, and the embeddings that enter the queue."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    student = [normalize(networks["student"](view), dim=1) for view in images]
    with torch.no_grad():
        momentum_params, student_params = (
            list(networks[name].parameters()) for name in ("momentum", "student")
        )
        torch._foreach_lerp_(momentum_params, student_params, 1 - EMA_RATE)
        key = normalize(networks["momentum"](images[1]), dim=1)
        teacher = [normalize(networks["teacher"](view), dim=1) for view in images]
    positives = (student[0] * key).sum(1, keepdim=True)
    logits = torch.cat([positives, student[0] @ queue.clone()], dim=1) / WARM
    loss = cross_entropy(logits, torch.zeros(len(key), dtype=torch.long, device=key.device))
    for student_rows, teacher_rows in zip(student, teacher, strict=True):
        loss = loss + WEIGHT * (student_rows - teacher_rows).square().sum(1).mean()
    return loss, key


def seed_loss(networks, images, queue):
    """Returns the loss, and the embeddings that enter the queue.

    The teacher's similarities are float32, which its low temperature requires.
    """
    import torch
    from torch.nn.functional import cross_entropy, normalize

    student = normalize(networks["student"](images[0]), dim=1)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        with torch.autocast(
            student.device.type, torch.bfloat16, enabled=student.dtype != torch.float32
        ):
            raw = networks["teacher"](images[0])
        teacher = normalize(raw.float(), dim=1)
        exact = torch.cat([(teacher * teacher).sum(1, keepdim=True), teacher @ queue], dim=1)
        probabilities = torch.softmax(exact / COLD, dim=1)
    positives = (student * teacher).sum(1, keepdim=True)
    logits = torch.cat([positives, student @ queue.clone()], dim=1) / WARM
    return cross_entropy(logits, probabilities), teacher


if __name__ == "__main__":
    main()
