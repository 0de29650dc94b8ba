"""One model of each family that is pruned: random weights, small where that keeps the structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import models
import torch
from torch import nn


class Tensors(nn.Module):
    """A model of transformers that takes token ids and gives one tensor."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(
            self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options()), self.output
        )
        return result

    def _options(self) -> dict[str, Any]:
        return {"use_cache": False} if self.output == "logits" else {}


class Normed(nn.Module):
    """Residual blocks with group normalization, in place of batch normalization."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 2 * width, 3, padding=1),
                nn.GroupNorm(8, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, width, 3, padding=1),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with what it takes.

    Attributes:
        inputs, dynamic: as on the command line.
    """

    family: str
    make: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    dynamic: tuple[str, ...]


def _vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of torchvision."""

    def make() -> nn.Module:
        import torchvision

        model: nn.Module = getattr(torchvision.models, name)(weights=None, **options)
        return model

    return make


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    model: nn.Module = SwinTransformer(
        patch_size=[4, 4], embed_dim=48, depths=[2, 2, 2, 2], num_heads=[2, 3, 6, 12], window_size=[4, 4]
    )
    return model


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(
        image_size=64, patch_size=16, num_layers=4, num_heads=6, hidden_dim=192, mlp_dim=768
    )
    return model


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of timm."""

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        return model

    return make


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000, hidden_size=192, num_hidden_layers=3, num_attention_heads=6, intermediate_size=768
    )
    return Tensors(BertModel(config, add_pooling_layer=False), "last_hidden_state")


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Tensors(GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=192, n_layer=3, n_head=6)), "logits")


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=192, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return Tensors(LlamaForCausalLM(config), "logits")


def _image(family: str, make: Callable[[], nn.Module], size: int = 64) -> Case:
    return Case(family, make, (f"x:1x3x{size}x{size}",), ("x:0=1..2..8",))


def _tokens(family: str, make: Callable[[], nn.Module]) -> Case:
    axes = tuple(f"{name}:0=1..2..8" for name in ("input_ids", "attention_mask"))
    lengths = tuple(f"{name}:1=2..16..64" for name in ("input_ids", "attention_mask"))
    return Case(family, make, ("input_ids:1x16:int64", "attention_mask:1x16:int64"), (*axes, *lengths))


CASES = {
    "torchvision/resnet50": _image("ResNet", _vision("resnet50")),
    "torchvision/densenet121": _image("DenseNet", _vision("densenet121")),
    "torchvision/mobilenet_v2": _image("MobileNet", _vision("mobilenet_v2")),
    "torchvision/mobilenet_v3_small": _image("MobileNet", _vision("mobilenet_v3_small")),
    "torchvision/efficientnet_b0": _image("EfficientNet", _vision("efficientnet_b0")),
    "torchvision/regnet_y_400mf": _image("RegNet", _vision("regnet_y_400mf")),
    "torchvision/shufflenet_v2": _image("ShuffleNet", _vision("shufflenet_v2_x0_5")),
    "torchvision/convnext_tiny": _image("ConvNeXt", _vision("convnext_tiny")),
    "torchvision/vit": _image("ViT", _vit),
    "torchvision/swin": _image("Swin", _swin, 128),
    "timm/resnet26d": _image("ResNet", _timm("resnet26d")),
    "timm/densenet121": _image("DenseNet", _timm("densenet121")),
    "timm/mobilenetv3_small_100": _image("MobileNet", _timm("mobilenetv3_small_100")),
    "timm/efficientnet_lite0": _image("EfficientNet", _timm("efficientnet_lite0")),
    "timm/regnetx_002": _image("RegNet", _timm("regnetx_002")),
    "timm/convnext_atto": _image("ConvNeXt", _timm("convnext_atto")),
    "timm/vit_tiny": _image("ViT", _timm("vit_tiny_patch16_224", img_size=64, depth=4)),
    "timm/swin_tiny": _image(
        "Swin",
        _timm("swin_tiny_patch4_window7_224", img_size=128, window_size=4, embed_dim=48, depths=(2, 2, 2, 2)),
        128,
    ),
    "transformers/bert": _tokens("BERT", _bert),
    "transformers/gpt2": _tokens("GPT-2", _gpt2),
    "transformers/llama": _tokens("Llama", _llama),
    "dlrm": Case(
        "DLRM", models.DLRM, ("dense:1x13", "categories:1x8:int64"), ("dense:0=1..2..8", "categories:0=1..2..8")
    ),
    "lstm": Case("LSTM", models.Tagger, ("words:1x16:int64",), ("words:0=1..2..8",)),
    "unet": _image("U-Net", models.UNet),
    "groupnorm": _image("GroupNorm", Normed),
}
