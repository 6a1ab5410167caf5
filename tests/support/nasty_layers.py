"""Nasty models, kind ``modules``, continued: attention, recurrent layers, and weights that are computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nasty_base import STEPS, WIDTH, Small, features, images, sequences, tokens
from nasty_modules import linear, modules
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


@modules.forward(sequences, parts={"mha": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True)})
def attention_with_weights(self, x):
    h, weights = self.mha(self.lin(x), x, x, need_weights=True, average_attn_weights=False)
    return self.out(h), weights


@modules.forward(
    lambda rows: (torch.randn(rows, STEPS, WIDTH), torch.rand(rows, STEPS) > 0.8),
    parts={"mha": lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True)},
)
def attention_with_masks(self, x, padding):
    padding = padding & (torch.arange(x.shape[1]) > 0)
    causal = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
    h, weights = self.mha(x, x, x, key_padding_mask=padding, attn_mask=causal)
    return self.out(h), weights


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.2, batch_first=True)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH))


@modules.forward(sequences, parts={"encoder": encoder})
def transformer_encoder(self, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return self.out(self.encoder(self.lin(x), mask=mask, is_causal=True))


@modules.forward(
    lambda rows: (torch.randn(rows, STEPS, WIDTH), torch.randint(1, STEPS + 1, (rows,))), parts={"encoder": encoder}
)
def transformer_encoder_with_padding(self, x, lengths):
    padding = torch.arange(x.shape[1])[None] >= lengths[:, None]
    h = self.encoder(self.lin(x), src_key_padding_mask=padding)
    return self.out(h.masked_fill(padding[..., None], 0.0).sum(1))


@modules.forward(
    sequences, parts={"decoder": lambda: nn.TransformerDecoderLayer(WIDTH, 2, 8, batch_first=True, norm_first=True)}
)
def transformer_decoder(self, x):
    return self.out(self.decoder(x, self.lin(x)))


@modules.forward(sequences, parts={"lstm": lambda: nn.LSTM(WIDTH, 4, 2, dropout=0.2, batch_first=True)})
def lstm(self, x):
    h, (last, cell) = self.lstm(self.lin(x))
    return h, last.transpose(0, 1), cell[-1]


@modules.forward(sequences, parts={"gru": lambda: nn.GRU(WIDTH, 3, bidirectional=True, batch_first=True)})
def gru_with_own_start(self, x):
    start = torch.zeros(2, x.size(0), 3, device=x.device, dtype=x.dtype)
    self.gru.flatten_parameters()
    h, _ = self.gru(x, start)
    return self.out(h[:, -1])


@modules.forward(sequences, parts={"rnn": lambda: nn.RNN(WIDTH, WIDTH)})
def rnn_with_steps_first(self, x):
    return self.out(self.rnn(x.transpose(0, 1))[0].transpose(0, 1))


@modules.forward(
    lambda rows: (torch.randn(rows, STEPS, WIDTH), torch.randint(1, STEPS + 1, (rows,))),
    parts={"gru": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True)},
)
def packed_sequences(self, x, lengths):
    packed = pack_padded_sequence(self.lin(x), lengths.cpu(), batch_first=True, enforce_sorted=False)
    h, last = self.gru(packed)
    h, sizes = pad_packed_sequence(h, batch_first=True, total_length=x.shape[1])
    return self.out(h), last[0], sizes


@modules.forward(sequences, parts={"cell": lambda: nn.LSTMCell(WIDTH, WIDTH), "gru": lambda: nn.GRUCell(WIDTH, WIDTH)})
def cells_in_a_loop(self, x):
    state = None
    extra = x.new_zeros(x.size(0), WIDTH)
    for step in x.unbind(1):
        state = self.cell(step, state)
        extra = self.gru(state[0], extra)
    return self.out(extra + state[1])


for name, wrap in (
    ("WeightNorm", parametrizations.weight_norm),
    ("SpectralNorm", parametrizations.spectral_norm),
    ("Orthogonal", parametrizations.orthogonal),
    ("SpectralNormOfOldStyle", nn.utils.spectral_norm),
    ("Pruned", lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    ("WeightNormOfOldStyle", nn.utils.weight_norm),
):
    copies = name not in ("WeightNormOfOldStyle", "Pruned")
    modules.add(name, lambda wrap=wrap: nn.Sequential(wrap(linear()), nn.Tanh(), linear()), features, copies=copies)


@modules.model()
class OwnParametrization(Small):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).transpose(-1, -2)

    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.lin, "weight", self.Symmetric())

    def forward(self, x):
        with parametrize.cached():
            return self.out(self.lin(self.lin(x)) + F.linear(x, self.lin.weight))


class Scaled(nn.Parameter):
    """A parameter of a class of its own, which doubles what ``torch.add`` gives."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result * 2 if func in (torch.add, torch.Tensor.add) else result


@modules.forward(parts={"scaled": lambda: Scaled(torch.randn(WIDTH))})
def parameter_of_a_subclass(self, x):
    return self.out(torch.add(self.lin(x), self.scaled))


@modules.forward(parts={"hyper": lambda: nn.Linear(WIDTH, WIDTH * WIDTH)})
def weights_made_by_a_layer(self, x):
    weight = self.hyper(x.mean(0)).view(WIDTH, WIDTH)
    per_row = self.hyper(x).view(x.shape[0], WIDTH, WIDTH)
    return self.out(F.linear(x, weight) + torch.bmm(per_row, self.lin(x).unsqueeze(2)).squeeze(2))


@modules.forward(tokens, parts={"bag": lambda: nn.EmbeddingBag(11, WIDTH, mode="mean")})
def embedding_bag(self, ids):
    offsets = torch.arange(0, ids.numel(), ids.shape[1])
    return self.out(self.lin(self.bag(ids)) + self.bag(ids.flatten(), offsets))


@modules.forward(images, parts={"conv": lambda: nn.Conv2d(3, 4, 3, padding=1), "pool": lambda: nn.MaxPool2d(2, 2)})
def pool_and_unpool(self, x):
    h, places = F.max_pool2d(self.conv(x), 2, return_indices=True)
    h = F.max_unpool2d(h, places, 2)
    return F.fold(F.unfold(h, 2, stride=2), h.shape[-2:], 2, stride=2) + self.pool(self.conv(x)).mean()
