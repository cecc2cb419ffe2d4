"""The models that are written in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet18(nn.Module):
    """The layers of ResNet-18, with few channels."""

    def __init__(self, width: int = 8, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks, channels = [], width
        for i, stride in enumerate((1, 2, 2, 2)):
            outputs = width * 2 ** min(i, 2)
            blocks += [BasicBlock(channels, outputs, stride), BasicBlock(outputs, outputs, 1)]
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class UNet(nn.Module):
    """Two levels; up through a transposed convolution, or through interpolation of the given mode."""

    def __init__(self, up: str, width: int = 8):
        super().__init__()
        self.up = up

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.GroupNorm(2, outputs),
                nn.SiLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, padding_mode="reflect"),
                nn.LeakyReLU(0.1),
            )

        self.down1, self.down2, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        if up == "transposed":
            self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
            self.up1 = nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1)
        else:
            corners = None if up == "nearest" else up == "bicubic"
            self.up2 = nn.Sequential(
                nn.Upsample(scale_factor=2, mode=up, align_corners=corners), nn.Conv2d(4 * width, 2 * width, 1)
            )
            self.up1 = nn.Sequential(
                nn.Upsample(scale_factor=2, mode=up, align_corners=corners), nn.Conv2d(2 * width, width, 1)
            )
        self.join2, self.join1 = block(4 * width, 2 * width), block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.bottom(F.avg_pool2d(two, 2))
        y = self.join2(torch.cat([two, self.up2(y)], dim=1))
        y = self.join1(torch.cat([one, self.up1(y)], dim=1))
        return torch.sigmoid(self.head(y))


class TextClassifier(nn.Module):
    """Embedding, two recurrent layers in both directions, packed where lengths are given."""

    def __init__(self, cell: str, vocabulary: int = 40, width: int = 16, classes: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.rnn = getattr(nn, cell)(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embedding(tokens)
        if lengths is None:
            return self.head(self.norm(self.rnn(x)[0].mean(1)))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(self.norm(out.sum(1) / lengths[:, None]))


class EncoderClassifier(nn.Module):
    """`nn.TransformerEncoder` over padded tokens, the mean of what is not padding."""

    def __init__(self, norm_first: bool, vocabulary: int = 40, width: int = 32, classes: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.1)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=not norm_first)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        padding = tokens == 0
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        x = self.encoder(x, src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0.0)
        return self.head(x.sum(1) / (~padding).sum(1, keepdim=True))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` with a causal mask, and the weights that it returns."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(x, x, x, attn_mask=mask, average_attn_weights=False)


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` over keys and values of another width, with padding, bias rows and a zero row."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            width, 4, kdim=24, vdim=20, add_bias_kv=True, add_zero_attn=True, batch_first=True
        )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        with_weights, _ = self.attention(query, key, value, key_padding_mask=padding)
        return with_weights + self.attention(query, key, value, key_padding_mask=padding, need_weights=False)[0]
