"""Families of backbones whose checkpoints are read and written: one module per family."""

from disco_jax.convert.backbones import efficientnet, mobilenet, resnet, vit, xcit

FAMILIES = (resnet.FAMILY, mobilenet.FAMILY, efficientnet.FAMILY, xcit.FAMILY, vit.FAMILY)
# Searched in order: the first layout whose signature is present is used.
LAYOUTS = tuple(layout for family in FAMILIES for layout in family.layouts)
