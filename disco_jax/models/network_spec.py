"""Description of a network: backbone, adapter, head and prototypes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """The fields of `config.student` and `config.teacher` that define a network.

    Attributes:
      backbone: name of a backbone, see `disco-jax list`; or module:Class
      width: channels of the first stage; 0: the backbone's default
      stem: imagenet | small
      zero_init_residual: true: as timm initialises ResNets (disagreement M4)
      grid: patches a side in a ViT's position embedding; 0: the backbone's default
      patch: side of a ViT's or XCiT's patches in px; 0: the backbone's default
      drop_path: stochastic depth rate of a ViT or XCiT during training
      norm_group: images that share BatchNorm statistics. 0: all of a device, or with norm="sync" of
        all devices. Only with "sync" may a group span devices.
      adapter: width of a linear layer between backbone and head; 0: none
      head: mlp | mlp_bn | mlp_bn_all | mlp_unit | mlp_narrow | swav | swav_narrow | dino | dino_bn
        | regression | none
      hidden: width of the head; 0: one linear layer, -1: the width of the features
      layers: linear layers of the head; 0: its default, which is three for DINO, else two
      dim: width of the embedding
      prototypes: prototypes in each set of prototypes behind the head
      predictor: width of BYOL's predictor behind the head; 0: none
    """

    backbone: str = "resnet18"
    width: int = 0
    stem: str = ""
    zero_init_residual: bool = False
    grid: int = 0
    patch: int = 0
    drop_path: float = 0.0
    norm_group: int = 0
    adapter: int = 0
    head: str = "mlp"
    hidden: int = 2048
    layers: int = 0
    dim: int = 128
    prototypes: tuple[int, ...] = ()
    predictor: int = 0
