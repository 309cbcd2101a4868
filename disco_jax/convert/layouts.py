"""Finds networks in a state dict by the signatures of the layouts."""

from disco_jax.convert.backbones import LAYOUTS
from disco_jax.convert.family import Layout, State


def networks(state: State) -> dict[str, str]:
    """Returns prefix -> layout name of every network in a state dict, copies included."""
    layouts: dict[str, str] = {}
    for layout in LAYOUTS:
        first = layout.signature[0]
        for key in state:
            if key == first or key.endswith("." + first):
                prefix = key.removesuffix(first)
                outer = prefix.removesuffix("encoder.")  # SSLight's layout contains Lightly's
                if layouts.keys() & {prefix, outer}:
                    continue
                if _has_signature(state, prefix, layout):
                    layouts[prefix] = layout.name
    return layouts


def layout_at(state: State, prefix: str) -> Layout | None:
    """Returns the first layout whose signature is under `prefix`; None if there is none."""
    return next((layout for layout in LAYOUTS if _has_signature(state, prefix, layout)), None)


def _has_signature(state: State, prefix: str, layout: Layout) -> bool:
    """Returns whether a layout's signature is present and starts with a convolution's weight."""
    first = state.get(prefix + layout.signature[0])
    if first is None or first.ndim != 4 or not first.size:
        return False
    return all(prefix + key in state for key in layout.signature)
