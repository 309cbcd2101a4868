"""Modules of transformer blocks, which ViT and XCiT share."""

from collections.abc import Iterator

from disco_jax.convert.names import ModuleMap


def attention_mlp(torch: str, flax: str) -> Iterator[ModuleMap]:
    """Yields attention and MLP of one block."""
    yield ModuleMap(f"{torch}.norm1", f"{flax}/norm1", "layer_norm")
    yield ModuleMap(f"{torch}.attn.qkv", f"{flax}/qkv", "linear")
    yield ModuleMap(f"{torch}.attn.proj", f"{flax}/proj", "linear")
    yield ModuleMap(f"{torch}.norm2", f"{flax}/norm2", "layer_norm")
    yield ModuleMap(f"{torch}.mlp.fc1", f"{flax}/mlp/fc1", "linear")
    yield ModuleMap(f"{torch}.mlp.fc2", f"{flax}/mlp/fc2", "linear")
