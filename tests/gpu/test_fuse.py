import json

import numpy as np
import pytest
import torch

import enginesmith as es

pytestmark = pytest.mark.gpu

FUSED = ("Attention", "BiasGelu", "SkipLayerNormalization")


class Block(torch.nn.Module):
    """A layer of an encoder, with a mask of padding."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.first, self.second = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        allowed = torch.arange(length, device=x.device)[None, None, None, :] < lengths[:, None, None, None]
        q, k, v = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = self.first(x + self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return self.second(x + self.down(torch.nn.functional.gelu(self.up(x))))


def test_fused_operators_run_on_the_gpu_in_both_precisions(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINESMITH_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    x = random.standard_normal((16, 32, 64)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, lengths=random.integers(8, 33, 16))
    es.compile(
        Block().eval(),
        tmp_path / "out",
        inputs=["x:4x32x64", "lengths:4:int64"],
        dynamic=["x:0=1..4..8", "lengths:0=1..4..8"],
        targets=["onnxruntime-cuda"],
        precisions=["fp32", "fp16"],
        passes=["simplify", "dedupe", "fuse-transformer:scheme=onnxruntime-cuda"],
        data=str(tmp_path / "data.npz"),
        benchmark=False,
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for engine in manifest["engines"]:
        assert engine["validation"]["passed"], engine
        assert set(FUSED) <= set(engine["details"]["operators"])
        assert not set(FUSED) & set(engine["details"]["on_cpu"])
